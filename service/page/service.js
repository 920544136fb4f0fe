// Requests to the service. Addresses are relative, so that the page works below any path.

const KEY = "latentwire-key"; // in sessionStorage: gone when the tab closes

/** A request that got no answer; the message is the service's own sentence. */
export class Refused extends Error {
  constructor(sentence, status, param) {
    super(sentence);
    Object.assign(this, { status, param });
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export function keep(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** The response to a GET, to a POST where there is a body, or to whatever `method` says. */
export async function ask(path, body, signal, method = body ? "POST" : "GET") {
  const headers = body ? { "content-type": "application/json" } : {};
  if (hasKey()) headers.authorization = `Bearer ${sessionStorage.getItem(KEY)}`;
  const options = { method, headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(path, options).catch((error) => {
    throw signal?.aborted ? error : new Refused(`The request did not reach the service: ${error.message}.`);
  });
  if (response.ok) return response;
  const { message, param } = (await response.json().catch(() => null))?.error ?? {};
  throw new Refused(message ?? `The service answered with status ${response.status}.`, response.status, param);
}

/** The server-sent events of a response, as { name, data }. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const event of blocks.map(eventOf)) if (event.name) yield event; // a comment has no name
  }
}

function eventOf(block) {
  const line = (name) => block.split("\n").find((one) => one.startsWith(`${name}: `))?.slice(name.length + 2);
  return { name: line("event"), data: JSON.parse(line("data") ?? "null") };
}
