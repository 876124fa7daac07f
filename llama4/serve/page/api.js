// What the page asks of its server. Addresses are relative, so that it works behind a proxy's path, too.

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The model's name, its window, and whether it sees. */
export async function describe(key) {
  const [models, props] = await Promise.all([ask("v1/models", key), ask("props", key)]);
  const [{ id, max_model_len: window }] = models.data;
  return { name: id, window, sees: props.modalities?.vision !== false };
}

async function ask(path, key) {
  return (await checked(() => fetch(path, { headers: headersOf(key) }))).json();
}

/** A reply as it comes: objects with `text`, `toolCalls`, `finish` or `usage`. */
export async function* stream(body, key, signal) {
  const request = {
    method: "POST",
    headers: { ...headersOf(key), "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  };
  const response = await checked(() => fetch("v1/chat/completions", request));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ServerError(event.error.message, response.status);
    const [choice] = event.choices ?? [];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.delta?.tool_calls) yield { toolCalls: choice.delta.tool_calls };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (event.usage) yield { usage: event.usage };
  }
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

async function checked(send) {
  let response;
  try {
    response = await send();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ServerError(told?.error?.message ?? `The server answered with ${response.status}.`, response.status);
}

function headersOf(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}
