// Calls /@connections with AWS's SDK: a list of { endpoint, credentials, command, input,
// maxAttempts } on stdin, `input.Data` in base64; on stdout, for each, its result or the
// name and the status of its exception.

import { json } from "node:stream/consumers";

import * as sdk from "@aws-sdk/client-apigatewaymanagementapi";

const calls = await json(process.stdin);
const results = [];
for (const { endpoint, credentials, command, input, maxAttempts = 1 } of calls) {
  const client = new sdk.ApiGatewayManagementApiClient({
    endpoint,
    credentials,
    region: "eu-central-1",
    maxAttempts,
  });
  if (input.Data !== undefined) input.Data = Buffer.from(input.Data, "base64");
  try {
    const { $metadata, ...result } = await client.send(new sdk[command](input));
    results.push({ status: $metadata.httpStatusCode, ...result });
  } catch (error) {
    if (!(error instanceof sdk.ApiGatewayManagementApiServiceException)) throw error;
    const typed = sdk[error.name] !== undefined && error instanceof sdk[error.name];
    results.push({
      status: error.$metadata.httpStatusCode,
      name: error.name,
      message: error.message,
      typed,
    });
  }
  client.destroy();
}
process.stdout.write(JSON.stringify(results));
