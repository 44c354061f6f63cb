/** The service's API: requests with the caller's key, problems (RFC 9457) as errors, and event streams. */

const KEY = "candlecast-key";
const SILENCE_MS = 60_000; // a stream is kept alive more often than that

/** An answer that is none: `status` 0 where nothing answered at all. */
export class Problem extends Error {
  constructor(status, { title, detail, errors = [], next_steps: nextSteps = [] }) {
    super(detail || title || `status ${status}`);
    const faults = errors.filter((each) => each.detail !== detail);
    this.faults = faults.map((each) => `${(each.pointer ?? each.parameter).replace("/", "")}: ${each.detail}`);
    Object.assign(this, { status, nextSteps });
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/** The JSON at a path; `query` leaves out what is null or empty, `body` makes it a POST. Problem, or AbortError. */
export async function ask(path, { query, body, signal } = {}) {
  const sent = body && { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  const response = await send(path, query, { ...sent, signal });
  return response.json();
}

/** Each event of a stream as `{id, data}`, until it ends or falls silent. Problem, or AbortError. */
export async function* listen(path, { query, lastId, signal }) {
  const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
  const response = await send(path, query, { headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { done, value } = await unlessSilent(reader);
    if (done) return;
    const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    yield* blocks.map(parsed).filter((event) => event.data);
  }
}

/** Wait; AbortError if told to stop meanwhile. */
export function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal.removeEventListener("abort", stop), resolve()), ms);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
  });
}

async function send(path, query, { headers, ...options }) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query ?? {})) {
    if (value != null && value !== "") url.searchParams.set(name, value);
  }
  const authorization = key.get() && { Authorization: `Bearer ${key.get()}` };
  let response;
  try {
    response = await fetch(url, { ...options, headers: { ...headers, ...authorization } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The service does not answer." });
  }
  if (!response.ok) throw new Problem(response.status, await response.json().catch(() => ({})));
  return response;
}

async function unlessSilent(reader) {
  const timer = setTimeout(() => reader.cancel(), SILENCE_MS);
  try {
    return await reader.read();
  } finally {
    clearTimeout(timer);
  }
}

function parsed(block) {
  const lines = block.split("\n");
  const values = (name) =>
    lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart());
  return { id: values("id").at(-1), data: values("data").join("\n") };
}
