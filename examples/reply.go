// The smallest backend in Go: it answers each message in the response.
//
//     PORT=8000 go run examples/reply.go
//     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message

package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
)

func message(w http.ResponseWriter, r *http.Request) {
	var event struct{ Message string }
	if err := json.NewDecoder(r.Body).Decode(&event); err != nil {
		http.Error(w, "the body is no event", http.StatusBadRequest)
		return
	}
	commands := []map[string]string{{"send": "you said: " + event.Message}}
	w.Header().Set("Content-Type", "application/vnd.socketdock+json")
	json.NewEncoder(w).Encode(map[string]any{"commands": commands})
}

func main() {
	http.HandleFunc("/message", message)
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), nil))
}
