// The smallest backend as a Cloudflare Worker: it answers each message in the response.
//
//     npx wrangler deploy examples/reply_worker.mjs --name=socketdock-backend \
//         --compatibility-date=2026-01-01
//     .venv/bin/socketdock --backend=http \
//         --messageuri=https://socketdock-backend.example.workers.dev/
export default {
  async fetch(request) {
    const event = await request.json();
    const commands = [{ send: `you said: ${event.message}` }];
    const headers = { "Content-Type": "application/vnd.socketdock+json" };
    return Response.json({ commands }, { headers });
  },
};
