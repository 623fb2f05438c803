// OpenAI's own Node SDK against running gateways: plays each scenario below and prints one JSON
// line for it, with what the SDK said and what the upstream recorded. It judges nothing.
//
// Its one argument is JSON: {"demo": the upstream's address, "token": the upstream's token,
// "tools": [...], "gateways": {name: {"url", "key", "suspended"}}}.

import OpenAI from "openai";

const given = JSON.parse(process.argv[2]);
const MODEL = "openai/gpt-4o-mini";
const MESSAGES = [{ role: "user", content: "Why is the sky blue? Grüße, 世界 😀" }];
const LONG = "mock/prose+len-5000+slow-5";

function client(gateway = "compat", options = {}) {
  const { url, key } = given.gateways[gateway];
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0, timeout: 20_000, ...options });
}

function straight() {
  return new OpenAI({ baseURL: `${given.demo}/v1`, apiKey: given.token, maxRetries: 0 });
}

async function control(method, path, body) {
  const response = await fetch(`${given.demo}/_demo/${path}`, {
    method,
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (!response.ok) throw new Error(`${method} ${path}: ${await response.text()}`);
  return response.status === 204 ? null : await response.json();
}

const script = (wish) => control("POST", "script", wish);

function ask(sdk, more = {}) {
  return sdk.chat.completions.create({ model: MODEL, messages: MESSAGES, ...more });
}

// What an application sees of an error.
function told(error) {
  return {
    class: error.constructor.name,
    status: error.status ?? null,
    code: error.code ?? null,
    type: error.type ?? null,
    param: error.param ?? null,
    request_id: error.requestID ?? null,
    message: error.message,
  };
}

async function failing(promise) {
  try {
    await promise;
  } catch (error) {
    return { error: told(error) };
  }
  return { error: null };
}

// A stream as an application assembles it; `leaveAfter` so many chunks, 0 for never.
async function hear(sdk, more = {}, leaveAfter = 0) {
  const heard = { text: "", chunks: 0, empty: 0, finish: [], usage: [], tool: null, error: null };
  const stream = await ask(sdk, { stream: true, ...more });
  try {
    for await (const chunk of stream) {
      heard.chunks += 1;
      if (chunk.choices.length === 0) heard.empty += 1;
      if (chunk.usage) heard.usage.push(chunk.usage);
      for (const choice of chunk.choices) {
        heard.text += choice.delta.content ?? "";
        if (choice.finish_reason) heard.finish.push(choice.finish_reason);
        for (const part of choice.delta.tool_calls ?? []) {
          heard.tool ??= { name: "", arguments: "" };
          heard.tool.name += part.function.name ?? "";
          heard.tool.arguments += part.function.arguments ?? "";
          if (part.extra_content) heard.tool.extra_content = part.extra_content;
        }
      }
      if (heard.chunks === leaveAfter) break;
    }
  } catch (error) {
    heard.error = told(error);
  }
  return heard;
}

const SCENARIOS = {
  async chat() {
    const answer = await ask(client());
    return { answer, straight: await ask(straight()), request_id: answer._request_id };
  },

  async chat_of_a_plain_server() {
    return { answer: await ask(client("openai")), straight: await ask(straight()) };
  },

  async stream() {
    return { heard: await hear(client()), straight: await hear(straight()) };
  },

  async stream_of_a_plain_server() {
    return { heard: await hear(client("openai")), straight: await hear(straight()) };
  },

  async stream_with_usage() {
    return await hear(client(), { stream_options: { include_usage: true } });
  },

  async stream_of_two() {
    const answer = await ask(client(), { n: 2 });
    const heard = await hear(client(), { n: 2 });
    return { texts: answer.choices.map((choice) => choice.message.content), finish: heard.finish };
  },

  async stream_in_crlf_and_pieces() {
    const messages = [{ role: "user", content: "Zwei  Leerzeichen 😀👩‍👩‍👧 \u2028 世界 Ende " }];
    const heard = await hear(client(), { model: "mock/echo+crlf+comments+split-1", messages });
    return { said: messages[0].content, heard };
  },

  async tools() {
    const wish = { tools: given.tools, tool_choice: "required" };
    const answer = await ask(client(), wish);
    return { call: answer.choices[0].message.tool_calls[0], heard: await hear(client(), wish) };
  },

  async geminis_signature_both_ways() {
    const wish = { model: "gemini/gemini-2.5-flash", tools: given.tools, tool_choice: "required" };
    const heard = await hear(client(), wish);
    const [call] = (await ask(client(), wish)).choices[0].message.tool_calls;
    const messages = [
      ...MESSAGES,
      { role: "assistant", content: null, tool_calls: [call] },
      { role: "tool", tool_call_id: call.id, content: "Rain." },
    ];
    await ask(client(), { ...wish, tool_choice: "auto", messages });
    const requests = await control("GET", "requests?count=3");
    return { call, heard, messages, sent: JSON.parse(requests[2].body).messages };
  },

  async helper_of_the_sdk() {
    const runner = client().chat.completions.stream({ model: MODEL, messages: MESSAGES });
    const events = [];
    runner.on("content", (piece) => events.push(piece));
    const final = await runner.finalChatCompletion();
    return { text: final.choices[0].message.content, pieces: events.join("") };
  },

  async raw_response() {
    const { data, response, request_id } = await ask(client()).withResponse();
    return { headers: Object.fromEntries(response.headers), request_id, id: data._request_id };
  },

  async models() {
    const ids = [];
    for await (const model of client().models.list()) ids.push(model.id);
    const shown = await client().models.retrieve(MODEL);
    return { ids, shown, ...(await failing(client().models.retrieve("openai/no-such-model"))) };
  },

  async fallback_behind_an_alias() {
    await script({ fault: "status-503", provider: "google-ai-studio" });
    const { data, response } = await ask(client(), { model: "auto" }).withResponse();
    return { provider: response.headers.get("x-gateway-provider"), text: data.choices[0].message.content };
  },

  async wrong_key() {
    return await failing(ask(client("compat", { apiKey: "gw_live_not-a-key", maxRetries: 2 })));
  },

  async suspended() {
    return await failing(ask(client("compat", { apiKey: given.gateways.compat.suspended })));
  },

  async unknown_model() {
    return await failing(ask(client("compat", { maxRetries: 2 }), { model: "no-such-model" }));
  },

  async model_without_a_price() {
    return await failing(ask(client("compat", { maxRetries: 2 }), { model: "openai/no-price" }));
  },

  async bad_field() {
    return await failing(ask(client("compat", { maxRetries: 2 }), { max_tokens: -1, stream: true }));
  },

  async throttled() {
    await script({ fault: "code-2003" });
    return await failing(ask(client()));
  },

  async throttled_with_retries() {
    await script({ fault: "code-2003", count: 0 });
    return await failing(ask(client("compat", { maxRetries: undefined })));
  },

  async failing_with_retries() {
    await script({ fault: "status-503", count: 0 });
    return await failing(ask(client("compat", { maxRetries: undefined }), { stream: true }));
  },

  async refused_with_retries() {
    await script({ fault: "status-400", count: 0 });
    return await failing(ask(client("compat", { maxRetries: undefined })));
  },

  async healed_by_a_retry() {
    await script({ fault: "status-503" });
    return { text: (await ask(client("compat", { maxRetries: 2 }))).choices[0].message.content };
  },

  async gateways_own_failure() {
    await script({ fault: "code-2005" });
    return await failing(ask(client()));
  },

  async wrong_upstream_token() {
    return await failing(ask(client("wrong_token")));
  },

  async blocked_by_policy() {
    await script({ fault: "code-2016" });
    return await failing(ask(client("compat", { maxRetries: 2 })));
  },

  async stream_reset() {
    await script({ fault: "reset-after-5" });
    return await hear(client("compat", { maxRetries: 2 }));
  },

  async stream_closed() {
    await script({ fault: "close-after-5" });
    return await hear(client("compat", { maxRetries: 2 }));
  },

  async stream_cut_cleanly() {
    await script({ fault: "eof-after-5" });
    return await hear(client("compat", { maxRetries: 2 }));
  },

  async stream_reset_inside_an_event() {
    await script({ writes: [...written("One ", "two "), 'data: {"choices":[{"ind'], end: "reset" });
    return await hear(client());
  },

  async stream_cut_inside_an_event() {
    await script({ writes: [...written("One ", "two "), 'data: {"choices":[{"ind'], end: "clean" });
    return await hear(client());
  },

  async stream_that_falls_silent() {
    await script({ fault: "stall-after-4" });
    return await hear(client("impatient"));
  },

  async error_as_first_event() {
    await script({ fault: "error-first" });
    return await failing(ask(client(), { stream: true }));
  },

  async error_in_the_middle() {
    await script({ fault: "error-event-after-4" });
    return await hear(client());
  },

  async guardrails() {
    await script({ fault: "guardrails" });
    const heard = await hear(client(), { stream_options: { include_usage: true } });
    return { heard, text: (await ask(client())).choices[0].message.content };
  },

  async break_out_of_a_stream() {
    const sdk = client();
    const heard = await hear(sdk, { model: LONG }, 5);
    await control("GET", "record?count=1");
    return { heard, again: await hear(sdk) };
  },

  async abort_a_stream() {
    const stream = await ask(client(), { model: LONG, stream: true });
    let chunks = 0;
    for await (const _ of stream) if (++chunks === 5) stream.controller.abort();
    await control("GET", "record?count=1");
    return { chunks };
  },

  async abort_a_call() {
    await script({ fault: "stall-before-headers" });
    const abort = new AbortController();
    const asked = failing(
      client().chat.completions.create({ model: MODEL, messages: MESSAGES }, { signal: abort.signal }),
    );
    await control("GET", "requests?count=1");
    abort.abort();
    const { error } = await asked;
    await control("GET", "record?count=1");
    return { error };
  },

  async sdk_waits_no_longer() {
    await script({ fault: "stall-before-headers" });
    const failed = await failing(ask(client("compat", { timeout: 400 })));
    await control("GET", "record?count=1");
    return failed;
  },

  async gateway_waits_no_longer() {
    await script({ fault: "stall-before-headers" });
    return await failing(ask(client("impatient")));
  },

  async twenty_at_once() {
    const sdk = client();
    const said = Array.from({ length: 20 }, (_, number) => `This is number ${number}, no other.`);
    const heard = await Promise.all(
      said.map((content) => hear(sdk, { model: "mock/echo", messages: [{ role: "user", content }] })),
    );
    return { said, heard: heard.map((each) => each.text) };
  },
};

function written(...texts) {
  return texts.map((content) => {
    const choice = { index: 0, delta: { content }, finish_reason: null };
    const chunk = { id: "c", object: "chat.completion.chunk", created: 0, model: "m", choices: [choice] };
    return `data: ${JSON.stringify(chunk)}\n\n`;
  });
}

for (const [name, play] of Object.entries(SCENARIOS)) {
  await control("DELETE", "");
  let line;
  try {
    line = { scenario: name, ...(await play()) };
  } catch (error) {
    line = { scenario: name, thrown: String(error.stack) };
  }
  // What the upstream served; of a scenario that asks it twice for comparison, both.
  line.record = await control("GET", "record");
  console.log(JSON.stringify(line));
}
