// Reads objects as JSON from stdin and validates those of KEDA and of the Prometheus operator against their CRDs.
// Prints their kinds as a JSON list; exits 1 with a message for the first that is wrong. argv: the directory in which
// node_modules is.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "keda.sh": "@kubernetes-models/keda",
  "monitoring.coreos.com": "@kubernetes-models/prometheus-operator",
};
const kinds = [];
for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const name = PACKAGES[object.apiVersion.split("/")[0]];
  if (name === undefined) continue;
  const directory = join(process.argv[2], "node_modules", name, object.apiVersion);
  const module = ["index.mjs", "index.js"].map((file) => join(directory, file)).find(existsSync);
  const { [object.kind]: Model } = await import(pathToFileURL(module));
  try {
    new Model(object).validate();
  } catch (error) {
    console.error(`${object.kind} ${object.metadata.name}: ${error.message}`);
    process.exit(1);
  }
  kinds.push(object.kind);
}
console.log(JSON.stringify(kinds));
