// The documents that are chosen, what is asked about them, and what the answer cost.

import { begin, part, showReads, shown, streamed } from "./answers.js";
import { bars, find, make, ms, submits, tell, whole } from "./elements.js";

const chosen = new Map(); // documents as GET /latents tells of them, by id, in the order in which they are read
let page = null; // what page.js lends
let asking = null; // the AbortController of the question that goes on

export const nameOf = ({ id, metadata }) => String(metadata?.title ?? id);

export const isChosen = (id) => chosen.has(id);

export function choose(one, wanted) {
  if (wanted) chosen.set(one.id, one);
  else chosen.delete(one.id);
  find("chosen").replaceChildren(...[...chosen.values()].map(item));
  find("none-chosen").hidden = chosen.size > 0;
}

/** Keep those that are to be kept, and none of the others. */
export function restrict(wanted) {
  for (const one of [...chosen.values()]) if (!wanted(one)) choose(one, false);
}

function item(one, at) {
  const drop = Object.assign(make("button", "Leave out"), { type: "button", className: "link" });
  drop.setAttribute("aria-label", `Leave out ${nameOf(one)}`);
  drop.addEventListener("click", () => {
    choose(one, false);
    const box = [...find("kept").querySelectorAll("input")].find(({ value }) => value === one.id);
    if (box) box.checked = false;
    (find("chosen").querySelectorAll("button")[at] ?? find("asked")).focus();
  });
  const mark = chosen.size > 1 ? `[${at + 1}] ` : ""; // as in the prompt
  return make("li", make("span", `${mark}${nameOf(one)}`), drop);
}

/** Ask what is chosen: one document as it is, several marked by their places in one prompt. */
async function askChosen() {
  const [documents, text] = [[...chosen.values()], find("asked").value];
  if (asking) return; // cancel it first
  if (!documents.length) return say("Choose a document first.", { problem: true });
  if (!text.trim()) return say("Write what to ask first.", { problem: true });
  asking = new AbortController();
  const sources = documents.map(({ id }) => ({ latent_id: id }));
  const body = { ...page.question(text), inputs: [sources.length > 1 ? { sources } : sources[0]] };
  const asked = { started: performance.now(), signal: asking.signal };
  show(documents, body.prompt);
  try {
    const { usage } = await shown("documents", asked, streamed("documents", body, asked));
    cost(documents, usage);
    const aloud = part("documents", ".said").textContent;
    say(`Answered from ${many(documents.length, "document")} in ${ms(performance.now() - asked.started)}.`, { aloud });
  } catch (error) {
    if (asked.signal.aborted) say("Cancelled.");
    else say("There is no answer.", { problem: true, aloud: error.message });
    page.refused(error);
  }
  asking = null;
  busy(false);
}

export const cancel = () => asking?.abort();

function show(documents, prompt) {
  begin("documents");
  find("told").hidden = false;
  find("cost").hidden = true;
  const marks = documents.map((one) => `${one.shape[0]} soft tokens: ${nameOf(one)}`);
  showReads("documents", prompt, page.template(), marks);
  const trained = page.bridge()?.sources_per_example[page.receiver()] ?? 1;
  find("beyond").hidden = documents.length <= trained;
  find("beyond").textContent = `This bridge was trained for ${trained > 1 ? "up to " : ""}${many(trained, "document")} `
    + `in one prompt and reads ${documents.length} here, so its answer is less to be relied on.`;
  busy(true);
  say("The answer is on its way.");
}

/** What the receiver read against what it would have read of the texts, as far as that is known. */
function cost(documents, usage) {
  const sum = (name) => documents.reduce((total, one) => total + (one[name] ?? 0), 0);
  const unknown = documents.filter((one) => one.source_tokens === null).length;
  const read = usage.soft_tokens + usage.prompt_tokens;
  const latents = [["Latents and prompt", read, "tokens", true], ["Latents", sum("bytes"), "bytes", true]];
  const texts = [
    ["Texts and prompt", sum("source_tokens") + usage.prompt_tokens, "tokens"],
    ["Texts", sum("source_bytes"), "bytes"],
  ];
  const rows = (at) => bars(unknown ? [latents[at]] : [texts[at], latents[at]]);
  find("cost-bars").replaceChildren(...rows(0), ...rows(1));
  const sender = usage.source_tokens ? `The sender read ${whole(usage.source_tokens)} tokens.` : "The sender did not run.";
  const compared = unknown
    ? `What the texts would have taken is not known of ${unknown === 1 ? "one" : unknown} of them.`
    : "Texts are counted in the sender's tokens; the receiver's own may be more or fewer.";
  find("cost-note").textContent = `${sender} ${compared}`;
  find("cost").hidden = false;
}

const many = (count, what) => `${whole(count)} ${what}${count === 1 ? "" : "s"}`;

const say = (line, options) => tell(find("ask-status"), line, options);

function busy(isBusy) {
  find("told").setAttribute("aria-busy", isBusy);
  find("ask").setAttribute("aria-disabled", isBusy);
  if (!isBusy && document.activeElement === find("ask-cancel")) find("ask").focus();
  find("ask-cancel").hidden = !isBusy;
}

/** Let questions be asked. At the key's end all is forgotten that it let see. */
export function listen(lent) {
  page = lent;
  submits(find("ask-form"), askChosen);
  find("ask-cancel").addEventListener("click", cancel);
}

export function clear() {
  cancel();
  restrict(() => false);
  for (const id of ["told", "cost"]) find(id).hidden = true;
  say("");
}
