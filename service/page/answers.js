// An answer in its place: the text as it comes, the numbers, and what the receiver reads.

import { make, ms } from "./elements.js";
import { Refused, ask, events } from "./service.js";

export const part = (condition, selector) => document.querySelector(`[data-condition="${condition}"] ${selector}`);

export function show(condition, name, text) {
  part(condition, `[data-number="${name}"]`).textContent = text;
}

/** An empty place for the answer that is on its way. */
export function begin(condition) {
  const place = part(condition, ".said");
  place.textContent = "";
  place.classList.remove("problem");
  delete place.dataset.ended;
  for (const name of ["first", "total", "tokens"]) show(condition, name, "–");
  show(condition, "read", "");
}

/** One answer, written into its place as it comes; what the service says of it at the end. */
export async function streamed(condition, body, { signal, started }) {
  let text = "";
  const response = await ask("generate", body, signal);
  for await (const { name, data } of events(response)) {
    signal.throwIfAborted(); // what had come already is not shown either
    if (name === "error") throw new Refused(data.error.message);
    if (name === "token") {
      if (!text) show(condition, "first", ms(performance.now() - started));
      text += data.text;
      part(condition, ".said").textContent = text.trimStart();
    } else if (name === "done") {
      end(condition, data, performance.now() - started);
      return data;
    }
  }
  throw new Refused("The stream ended before the answer did.");
}

/** The same answer; what it fails with is shown in its place. */
export async function shown(condition, { signal }, answer) {
  try {
    return await answer;
  } catch (error) {
    const place = part(condition, ".said");
    place.dataset.ended = "";
    if (!signal.aborted) {
      place.classList.add("problem");
      place.textContent = error.message;
    }
    throw error;
  }
}

function end(condition, { outputs: [output], usage }, milliseconds) {
  const place = part(condition, ".said");
  place.textContent = output.text.trim() || "(an empty answer)";
  place.dataset.ended = "";
  show(condition, "total", ms(milliseconds));
  show(condition, "tokens", `${output.token_count}${output.finish_reason === "length" ? " (the most)" : ""}`);
  show(condition, "read", `${countsRead(usage)}.`);
}

export function countsRead({ soft_tokens: soft, prompt_tokens: tokens }) {
  return soft ? `${soft} soft tokens and ${tokens} tokens of prompt` : `${tokens} tokens`;
}

/** The prompt as it is composed: the bridge's template around it, and what is `given`, in order, where it stands. */
export function showReads(condition, prompt, template, given) {
  const around = given.length > 1 ? template.replace("{latent}", "{latents}") : template;
  const whole = /\{latents?\}/.test(prompt) ? prompt : around.replace("{prompt}", () => prompt);
  const numbered = given.map((_, at) => `[${at + 1}] {latent}`).join("\n");
  const [before, ...after] = whole.replace("{latents}", numbered).split("{latent}");
  const marks = given.map((one) => one && make("mark", one));
  part(condition, ".reads").replaceChildren(before, ...after.flatMap((text, at) => [marks[at] ?? "{latent}", text]));
}
