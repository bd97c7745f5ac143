// What openai-node makes of streams: node stream.mjs URL MODEL prints it as JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "get_weather", parameters, strict: true } }];
const messages = [{ role: "user", content: "How is the weather in Rome?" }];

// Each chunk, as an application would read it.
const chunks = [];
const stream = await client.chat.completions.create({
  model, messages, tools, tool_choice: "required", stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) chunks.push(chunk);

// The library's own folding of the deltas, with its events.
const events = [];
const folding = client.chat.completions.stream({ model, messages, tools, tool_choice: "required" });
folding.on("tool_calls.function.arguments.delta", ({ name, arguments_delta }) => events.push([name, arguments_delta]));
const message = await folding.finalMessage();

// The same call through the other API.
const types = [];
const responding = client.responses.stream({
  model, input: messages, tools: [{ type: "function", name: "get_weather", parameters, strict: true }],
  tool_choice: "required",
});
for await (const event of responding) types.push(event.type);
const response = await responding.finalResponse();

console.log(JSON.stringify({ chunks, message, events, types, response }));
