// The page at "/": one question, asked three ways at once; and documents that are kept, asked together.

import { begin as beginAnswer, countsRead, part, show, showReads, shown, streamed } from "./answers.js";
import * as documents from "./documents.js";
import { bars, find, make, ms, size, submits, tell } from "./elements.js";
import { listen as listenToMap, showLatent } from "./latent.js";
import { ask, hasKey, keep } from "./service.js";

const CONDITIONS = { bridge: "From the latent", direct: "From the text", none: "From nothing" };
const EXAMPLES = {
  // What the bridge of a task was trained to be asked; bridges of other tasks start empty.
  world: {
    source: "Mara lives in Rome. Otto wants a cup of tea. The lamp is red. Nora is a baker. Ben lives in Oslo. "
      + "Lina has seven cats.",
    question: "Where does Mara live?",
    prompt: "Question: {question}\nAnswer:",
  },
};
const BLANK = { source: "", question: "", prompt: "{question}" };
const FIELDS = ["source", "question", "prompt", "bridge", "receiver", "temperature", "max-tokens", "seed", "key"];
const field = Object.fromEntries(FIELDS.map((id) => [id, find(id)]));

let bridges = []; // as GET /bridges told
let filled = BLANK; // what the page itself wrote into the fields
let running = null; // the AbortController of the run that goes on

// ---------------------------------------------------------------- a run

async function run() {
  if (running) return; // cancel it first
  running = new AbortController();
  const asked = {
    source: field.source.value,
    body: question(field.question.value),
    started: performance.now(),
    signal: running.signal,
  };
  const other = (condition, text) => streamed(condition, { ...asked.body, condition, inputs: [{ text }] }, asked);
  begin();
  const outcomes = await Promise.allSettled([
    shown("bridge", asked, fromLatent(asked)),
    shown("direct", asked, other("direct", asked.source)),
    shown("none", asked, other("none", "")),
  ]);
  running = null;
  finish(outcomes, asked);
  if (!asked.signal.aborted) await loadBridges(); // their memory may have changed; also asks for a key that is missing
}

/** What all requests have in common; fields left empty are left to the service. */
function question(text) {
  const number = (name) => (field[name].value === "" ? undefined : Number(field[name].value));
  return {
    bridge: field.bridge.value || undefined,
    receiver: field.receiver.value || undefined,
    prompt: promptAsSent(text),
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stream: true,
  };
}

const since = (asked) => performance.now() - asked.started;

/** First the sender's half, then the receiver's: all that the second request holds of the text is the message. */
async function fromLatent(asked) {
  const { source, body, signal } = asked;
  const response = await ask("encode", { bridge: body.bridge, inputs: [source] }, signal);
  const [sent] = (await response.json()).latents;
  const encodeMs = since(asked);
  find("crossed").hidden = false;
  showLatent(sent.data);
  reads("bridge", `${sent.shape[0]} soft tokens`);
  const answered = await streamed("bridge", { ...body, condition: "bridge", inputs: [{ latent: sent.data }] }, asked);
  show("bridge", "read", `${countsRead(answered.usage)}. Both times include ${ms(encodeMs)} for the sender.`);
  return { ...answered, sent };
}

function begin() {
  Object.keys(CONDITIONS).forEach(beginAnswer);
  preview();
  busy(true);
  say("Three answers are on their way.");
}

function finish(outcomes, asked) {
  busy(false);
  const problems = new Set(outcomes.filter((one) => one.reason).map((one) => one.reason.message));
  const [bridge, direct, none] = outcomes.map((one) => one.value?.usage);
  const textTokens = direct && none && direct.prompt_tokens - none.prompt_tokens;
  if (bridge) compare(outcomes[0].value.sent, bridge.soft_tokens, textTokens);
  if (asked.signal.aborted) say("Cancelled.");
  else if (problems.size) say([...problems].join(" "), { problem: true });
  else say(`Done in ${ms(since(asked))}.`, { aloud: Object.keys(CONDITIONS).map(spoken).join(" ") });
}

const spoken = (condition) => `${CONDITIONS[condition]}: ${part(condition, ".said").textContent}`;

function busy(isBusy) {
  find("answers").setAttribute("aria-busy", isBusy);
  find("run").setAttribute("aria-disabled", isBusy);
  if (!isBusy && document.activeElement === find("cancel")) find("run").focus();
  find("cancel").hidden = !isBusy;
}

const say = (line, options) => tell(find("status"), line, options);

// ---------------------------------------------------------------- the columns

function promptAsSent(text) {
  return field.prompt.value.replaceAll("{question}", () => text);
}

/** What the receiver is going to read in each column. */
function preview() {
  reads("bridge", "soft tokens");
  reads("direct", field.source.value);
  reads("none", "");
}

const template = () => chosen()?.template ?? "{latent}{prompt}";

function reads(condition, given) {
  showReads(condition, promptAsSent(field.question.value), template(), [given]);
}

/** Text against latent, in bytes and in tokens. `textTokens` is what the receiver reads of the text without it. */
function compare(sent, softTokens, textTokens) {
  const bytes = [["Text", sent.source_bytes, "bytes"], ["Latent message", sent.bytes, "bytes", true]];
  const tokens = [["Sender reads", sent.source_tokens, "tokens"], ["Receiver gets", softTokens, "soft tokens", true]];
  if (textTokens) tokens.splice(1, 0, ["Receiver would read", textTokens, "tokens"]);
  find("bars").replaceChildren(...bars(bytes), ...bars(tokens));
  const larger = " The message is larger than the text: what is saved is the receiver's reading, not the wire.";
  find("saving").textContent = `${(sent.source_tokens / softTokens).toFixed(1)} sender tokens became one soft token.`
    + (sent.bytes > sent.source_bytes ? larger : "");
}

// ---------------------------------------------------------------- the bridges

const chosen = () => bridges.find((one) => one.name === field.bridge.value);

/** List the bridges; the error where there is none to list. */
async function loadBridges() {
  try {
    bridges = (await (await ask("bridges")).json()).bridges;
  } catch (error) {
    say(error.message, { problem: true });
    refused(error);
    return error;
  }
  const before = field.bridge.value;
  options(field.bridge, bridges.map((one) => one.name));
  find("bridges").replaceChildren(...bridges.map(table));
  if (field.bridge.value !== before) choose();
  return null;
}

/** Fill a list, and leave what is chosen in it as it is. */
function options(select, names) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  if (names.includes(before)) select.value = before;
}

/** The chosen bridge's receivers, and its example where the fields hold nothing of the user's own. */
function choose() {
  options(field.receiver, chosen()?.receivers ?? []);
  const texts = Object.keys(BLANK);
  if (texts.every((name) => field[name].value === filled[name])) {
    filled = EXAMPLES[chosen()?.task] ?? BLANK;
    for (const name of texts) field[name].value = filled[name];
  }
  preview();
  documents.ofBridge();
}

function table(bridge) {
  const { name, encoder, latent_dim: C, task, steps, pinned, sender, receivers, engines } = bridge;
  const trained = `${encoder} encoder, ${C} channels, trained on ${task} for ${steps.toLocaleString("en")} steps`;
  const caption = make("caption", make("b", name), ` ${trained}${pinned ? ", pinned in memory" : ""}`);
  const names = ["Model", "Role", "Memory", "Engine"].map((one) => heading("col", one));
  const rows = receivers.map((one) => modelRow(bridge, one, "receiver", engines[one] ?? "–"));
  const body = make("tbody", modelRow(bridge, sender, "sender", "–"), ...rows);
  return make("table", caption, make("thead", make("tr", ...names)), body);
}

function modelRow({ loaded }, model, role, engine) {
  const memory = model in loaded ? size(loaded[model]) : "not loaded";
  return make("tr", heading("row", model), make("td", role), make("td", memory), make("td", engine));
}

function heading(scope, text) {
  const cell = make("th", text);
  cell.scope = scope;
  return cell;
}

// ---------------------------------------------------------------- the key

/** A refusal for want of a key asks for one. */
function refused({ status, message }) {
  if (status === 401) askForKey(message);
}

function askForKey(why) {
  keep(null);
  documents.clear(); // they are of the key that is gone
  find("forget").hidden = true;
  find("key-why").textContent = why;
  find("key-form").hidden = false;
  field.key.focus();
}

async function useKey() {
  keep(field.key.value.trim());
  field.key.value = "";
  find("key-form").hidden = true;
  find("forget").hidden = false;
  say("");
  const error = await loadBridges();
  if (error) return askForKey(error.message);
  field.source.focus();
  await documents.load();
}

// ---------------------------------------------------------------- from here on, the page listens

function onKey(event) {
  if (event.key === "Escape") {
    running?.abort();
    documents.cancel();
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && find("key-form").hidden) {
    event.preventDefault();
    const near = document.activeElement.closest("#documents form, #documents");
    if (near) (near.requestSubmit ? near : find("ask-form")).requestSubmit();
    else run();
  }
}

function listen() {
  submits(find("form"), run);
  submits(find("key-form"), useKey);
  document.addEventListener("keydown", onKey);
  find("cancel").addEventListener("click", () => running?.abort());
  find("refresh").addEventListener("click", loadBridges);
  find("forget").addEventListener("click", () => askForKey("The key is forgotten."));
  field.bridge.addEventListener("change", choose);
  for (const name of ["source", "question", "prompt"]) field[name].addEventListener("input", preview);
  listenToMap();
  documents.listen({ question, template, bridge: chosen, receiver: () => field.receiver.value, refused });
}

for (const place of document.querySelectorAll("[data-condition]")) place.append(find("answer").content.cloneNode(true));
find("forget").hidden = !hasKey();
listen();
if (!(await loadBridges())) await documents.load();
