<?php
// The smallest backend in PHP: it answers each message in the response.
//
//     php -d post_max_size=32M -S 127.0.0.1:8000 examples/reply.php
//     .venv/bin/socketdock --backend=http --messageuri=http://127.0.0.1:8000/message

$event = json_decode(file_get_contents('php://input'));
header('Content-Type: application/vnd.socketdock+json');
echo json_encode(['commands' => [['send' => "you said: $event->message"]]]);
