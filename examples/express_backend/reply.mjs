// The smallest backend in Express: it answers each message in the response.
//
//     npm ci --prefix examples/express_backend
//     node examples/express_backend/reply.mjs
//     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message
import express from "express";

const app = express();
app.use(express.json({ limit: "32mb" }));

app.post("/message", (request, response) => {
  const commands = [{ send: `you said: ${request.body.message}` }];
  response.type("application/vnd.socketdock+json").json({ commands });
});

app.listen(process.env.PORT ?? 8000, "127.0.0.1");
