// Verifies signed events with the `standardwebhooks` module: a list of
// { secret, headers, body } on stdin, the body in base64; on stdout, for each,
// whether it is verified.

import { json } from "node:stream/consumers";

import { Webhook, WebhookVerificationError } from "standardwebhooks";

const events = await json(process.stdin);
const verified = events.map(({ secret, headers, body }) => {
  try {
    new Webhook(secret).verify(Buffer.from(body, "base64"), headers);
    return true;
  } catch (error) {
    if (error instanceof WebhookVerificationError) return false;
    throw error;
  }
});
process.stdout.write(JSON.stringify(verified));
