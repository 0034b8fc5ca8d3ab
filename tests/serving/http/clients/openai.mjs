// What users' scripts do with OpenAI's package for Node, against the server whose address is given.
// node openai.mjs ADDRESS KEY NAME...: runs those of the scenarios below at once, and prints one
// JSON object of what each has found. The package is looked for in the folder that OPENAI_MODULES names.

import { createRequire } from "node:module";

const OpenAI = createRequire(process.env.OPENAI_MODULES + "/")("openai");
const [address, apiKey, ...names] = process.argv.slice(2);
const options = { baseURL: `${address}/v1`, apiKey, timeout: 60_000 };
const client = new OpenAI({ ...options, maxRetries: 0 });
const model = "fable-3m";
const said = (...texts) => texts.map((content) => ({ role: "user", content }));
const chat = { model, messages: said("Once upon"), max_tokens: 8, temperature: 0 };
const choice = {
  type: "object",
  properties: { of: { enum: ["here", "there"] } },
  required: ["of"],
  additionalProperties: false,
};
const tools = ["weather", "time"].map((name) => ({
  type: "function",
  function: { name, description: "x", parameters: choice },
}));
const tooled = { ...chat, tools, max_tokens: 200, parallel_tool_calls: false };
const time = { type: "function", function: { name: "time" } };

const all = async (stream) => {
  const found = [];
  for await (const chunk of stream) found.push(chunk);
  return found;
};

// What is told of an error.
const refused = async (asked) => {
  try {
    await asked;
  } catch (error) {
    const { status, code, param, type, message } = error;
    return { kind: error.constructor.name, status, code, param, type, message };
  }
  return { kind: "none" };
};

const scenarios = {
  models: async () => ({
    list: (await client.models.list()).data,
    one: await client.models.retrieve(model),
    other: await refused(client.models.retrieve("gpt-9")),
  }),
  stream: async () => ({
    plain: await client.chat.completions.create(chat),
    chunks: await all(
      await client.chat.completions.create({
        ...chat,
        stream: true,
        stream_options: { include_usage: true },
      }),
    ),
  }),
  helper: async () => {
    const runner = client.chat.completions.stream({ ...chat, stream: true });
    let told = "";
    runner.on("content", (delta) => (told += delta));
    const final = await runner.finalChatCompletion();
    return { final, told };
  },
  completion: async () => {
    const asked = { model, prompt: "Once upon", max_tokens: 8, temperature: 0.8, seed: 4 };
    return {
      plain: await client.completions.create({ ...asked, logprobs: 2 }),
      echoed: await client.completions.create({ ...asked, echo: true }),
      chunks: await all(await client.completions.create({ ...asked, stream: true })),
    };
  },
  several: () =>
    client.chat.completions.create({
      ...chat,
      n: 3,
      seed: 5,
      temperature: 1,
      max_tokens: 10,
      stop: [" the"],
      logprobs: true,
      top_logprobs: 4,
    }),
  forced: async () => {
    const asked = { ...tooled, tool_choice: time };
    const runner = client.chat.completions.stream({ ...asked, stream: true });
    return {
      plain: await client.chat.completions.create(asked),
      streamed: await runner.finalChatCompletion(),
    };
  },
  // A model that is made to decide so: its text is a call, or none.
  auto: async () => {
    const call = '<tool_call>\n{"name": "time", "arguments": {"of": "here"}}\n</tool_call>';
    const asked = { ...tooled, tool_choice: "auto" };
    return {
      calls: await client.chat.completions.create({ ...asked, guided_choice: [call] }),
      says: await client.chat.completions.create({ ...asked, guided_choice: ["It is noon."] }),
    };
  },
  // The helper that runs functions and tells the model what they gave, as often as it calls.
  runner: async () => {
    const given = [];
    const functions = tools.map((tool) => ({
      ...tool,
      function: {
        ...tool.function,
        parse: JSON.parse,
        function: (args) => (given.push(args), "noon"),
      },
    }));
    const asked = { ...tooled, tools: functions, tool_choice: time };
    const runner = client.chat.completions.runTools(asked);
    await runner.done();
    return { given, roles: runner.messages.map((message) => message.role) };
  },
  schema: async () => {
    const response_format = {
      type: "json_schema",
      json_schema: { name: "s", strict: true, schema: choice },
    };
    const asked = { ...chat, max_tokens: 200, response_format };
    return (await client.chat.completions.create(asked)).choices[0];
  },
  // The package asks for base64 by itself, and for numbers where it is told to.
  vectors: async () => {
    const asked = { model, input: ["Once", "One day"] };
    return {
      packed: await client.embeddings.create(asked),
      plain: await client.embeddings.create({ ...asked, encoding_format: "float" }),
    };
  },
  errors: async () => ({
    temperature: await refused(client.chat.completions.create({ ...chat, temperature: -1 })),
    streamed: await refused(client.chat.completions.create({ ...chat, n: 0, stream: true })),
    length: await refused(
      client.chat.completions.create({ ...chat, messages: said("fox ".repeat(2000)) }),
    ),
    model: await refused(client.chat.completions.create({ ...chat, model: "gpt-9" })),
    path: await refused(client.moderations.create({ input: "x" })),
    key: await refused(new OpenAI({ ...options, apiKey: "wrong", maxRetries: 0 }).models.list()),
  }),
  abort: async () => {
    const stream = await client.chat.completions.create({ ...chat, max_tokens: 900, stream: true });
    for await (const chunk of stream) {
      stream.controller.abort();
      return { role: chunk.choices[0].delta.role };
    }
  },
  // Refused, until there is room.
  patient: async () => {
    const patient = new OpenAI({ ...options, maxRetries: 5 });
    return (await patient.completions.create({ model, prompt: "Once", max_tokens: 2 })).usage;
  },
  impatient: () => refused(client.completions.create({ model, prompt: "Once", max_tokens: 2 })),
};

const found = await Promise.all(names.map(async (name) => [name, await scenarios[name]()]));
console.log(JSON.stringify(Object.fromEntries(found)));
