// What both JavaScript clients do: send, read what comes back, close. Without a
// close of their own, they ask the backend for one.
//
// The `ws` module has the browsers' WebSocket interface, so this runs in both.
// A message is { type: "text" | "binary", fragments: [string, ...] }; in binary
// ones each character is a byte.

export async function exchange(socket, { messages, close }) {
  socket.binaryType = "arraybuffer";
  await next(socket, "open");
  const received = [];
  for (const message of messages) {
    const answer = next(socket, "message");
    send(socket, message);
    received.push(toMessage((await answer).data));
  }
  const closed = next(socket, "close");
  if (close) socket.close(...close);
  else socket.send("please close");
  const { code, reason } = await closed;
  return { received, close: [code, reason] };
}

function send(socket, { type, fragments }) {
  fragments.forEach((fragment, index) => {
    const data = type === "text" ? fragment : toBytes(fragment);
    // Browsers know no second argument, and get no message in fragments.
    socket.send(data, { fin: index === fragments.length - 1 });
  });
}

function next(socket, type) {
  return new Promise((resolve, reject) => {
    const fail = (event) =>
      reject(new Error(`no ${type}: ${event.type} ${event.code} ${event.message}`));
    for (const [name, listener] of [[type, resolve], ["error", fail], ["close", fail]])
      socket.addEventListener(name, listener, { once: true });
  });
}

function toMessage(data) {
  return typeof data === "string"
    ? { type: "text", fragments: [data] }
    : { type: "binary", fragments: [toCharacters(new Uint8Array(data))] };
}

function toBytes(characters) {
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

function toCharacters(bytes) {
  const CHUNK = 8192; // arguments of one call, well within every engine's limit
  let characters = "";
  for (let start = 0; start < bytes.length; start += CHUNK)
    characters += String.fromCharCode(...bytes.subarray(start, start + CHUNK));
  return characters;
}
