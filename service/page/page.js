// The page at "/": one question, asked three ways at once.

import { listen as listenToMap, showLatent } from "./latent.js";
import { Refused, ask, events, hasKey, keep } from "./service.js";

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
const find = (id) => document.getElementById(id);
const FIELDS = ["source", "question", "prompt", "bridge", "receiver", "temperature", "max-tokens", "seed", "key"];
const field = Object.fromEntries(FIELDS.map((id) => [id, find(id)]));

let bridges = []; // as GET /bridges told
let filled = BLANK; // what the page itself wrote into the fields
let running = null; // the AbortController of the run that goes on

// ---------------------------------------------------------------- a run

async function run() {
  if (running) return; // cancel it first
  running = new AbortController();
  const asked = { ...question(), started: performance.now(), signal: running.signal };
  begin();
  const outcomes = await Promise.allSettled([
    shown("bridge", asked, fromLatent(asked)),
    shown("direct", asked, streamed("direct", { text: asked.source }, asked)),
    shown("none", asked, streamed("none", { text: "" }, asked)),
  ]);
  running = null;
  finish(outcomes, asked);
  if (!asked.signal.aborted) await loadBridges(); // their memory may have changed; also asks for a key that is missing
}

/** The text, and what all requests have in common; fields left empty are left to the service. */
function question() {
  const number = (name) => (field[name].value === "" ? undefined : Number(field[name].value));
  const body = {
    bridge: field.bridge.value || undefined,
    receiver: field.receiver.value || undefined,
    prompt: promptAsSent(),
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    stream: true,
  };
  return { source: field.source.value, body };
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
  showReads("bridge", `${sent.shape[0]} soft tokens`);
  const answered = await streamed("bridge", { latent: sent.data }, asked);
  show("bridge", "read", `${countsRead(answered.usage)}. Both times include ${ms(encodeMs)} for the sender.`);
  return { ...answered, sent };
}

/** One answer, written into its column as it comes. */
async function streamed(condition, given, asked) {
  let text = "";
  const response = await ask("generate", { ...asked.body, condition, inputs: [given] }, asked.signal);
  for await (const { name, data } of events(response)) {
    if (name === "error") throw new Refused(data.error.message);
    if (name === "token") {
      if (!text) show(condition, "first", ms(since(asked)));
      text += data.text;
      part(condition, ".said").textContent = text.trimStart();
    } else if (name === "done") {
      end(condition, data, since(asked));
      return data;
    }
  }
  throw new Refused("The stream ended before the answer did.");
}

/** The same answer; what it fails with is shown in its column. */
async function shown(condition, { signal }, answer) {
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

function begin() {
  for (const condition of Object.keys(CONDITIONS)) {
    const place = part(condition, ".said");
    place.textContent = "";
    place.classList.remove("problem");
    delete place.dataset.ended;
    for (const name of ["first", "total", "tokens"]) show(condition, name, "–");
    show(condition, "read", "");
  }
  preview();
  busy(true);
  tell("Three answers are on their way.");
}

function end(condition, { outputs: [output], usage }, milliseconds) {
  const place = part(condition, ".said");
  place.textContent = output.text.trim() || "(an empty answer)";
  place.dataset.ended = "";
  show(condition, "total", ms(milliseconds));
  show(condition, "tokens", `${output.token_count}${output.finish_reason === "length" ? " (the most)" : ""}`);
  show(condition, "read", `${countsRead(usage)}.`);
}

function finish(outcomes, asked) {
  busy(false);
  const problems = new Set(outcomes.filter((one) => one.reason).map((one) => one.reason.message));
  const [bridge, direct, none] = outcomes.map((one) => one.value?.usage);
  const textTokens = direct && none && direct.prompt_tokens - none.prompt_tokens;
  if (bridge) compare(outcomes[0].value.sent, bridge.soft_tokens, textTokens);
  if (asked.signal.aborted) tell("Cancelled.");
  else if (problems.size) tell([...problems].join(" "), { problem: true });
  else tell(`Done in ${ms(since(asked))}.`, { aloud: Object.keys(CONDITIONS).map(spoken).join(" ") });
}

const spoken = (condition) => `${CONDITIONS[condition]}: ${part(condition, ".said").textContent}`;

function busy(isBusy) {
  find("answers").setAttribute("aria-busy", isBusy);
  find("run").setAttribute("aria-disabled", isBusy);
  if (!isBusy && document.activeElement === find("cancel")) find("run").focus();
  find("cancel").hidden = !isBusy;
}

/** One line for everyone; `aloud` is for screen readers, who should not hear every token. */
function tell(line, { problem = false, aloud = "" } = {}) {
  const unseen = document.createElement("span");
  unseen.className = "unseen";
  unseen.textContent = aloud;
  find("status").replaceChildren(line, unseen);
  find("status").classList.toggle("problem", problem);
}

// ---------------------------------------------------------------- the columns

const part = (condition, selector) => document.querySelector(`[data-condition="${condition}"] ${selector}`);

function show(condition, name, text) {
  part(condition, `[data-number="${name}"]`).textContent = text;
}

function promptAsSent() {
  return field.prompt.value.replaceAll("{question}", () => field.question.value);
}

/** What the receiver is going to read in each column. */
function preview() {
  showReads("bridge", "soft tokens");
  showReads("direct", field.source.value);
  showReads("none", "");
}

/** The prompt as it is composed: the bridge's template around it, and `given` where the latent stands. */
function showReads(condition, given) {
  const prompt = promptAsSent();
  const template = chosen()?.template ?? "{latent}{prompt}";
  const whole = prompt.includes("{latent}") ? prompt : template.replace("{prompt}", () => prompt);
  const [before, ...after] = whole.split("{latent}");
  part(condition, ".reads").replaceChildren(before, given && make("mark", given), after.join("{latent}"));
}

function countsRead({ soft_tokens: soft, prompt_tokens: tokens }) {
  return soft ? `${soft} soft tokens and ${tokens} tokens of prompt` : `${tokens} tokens`;
}

const ms = (time) => (time < 9950 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(1)} s`);

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

function bars(rows) {
  const most = Math.max(...rows.map(([, count]) => count));
  return rows.map(([name, count, unit, isLatent]) => {
    const row = make("div", make("dt", name, make("b", `${count.toLocaleString("en")} ${unit}`)), make("dd"));
    row.className = isLatent ? "latent" : "";
    row.lastChild.style.width = `${(100 * count) / most}%`;
    return row;
  });
}

function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------- the bridges

const chosen = () => bridges.find((one) => one.name === field.bridge.value);

/** List the bridges; the error where there is none to list. */
async function loadBridges() {
  try {
    bridges = (await (await ask("bridges")).json()).bridges;
  } catch (error) {
    tell(error.message, { problem: true });
    if (error.status === 401) askForKey(error.message);
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

function size(bytes) {
  const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([least]) => bytes >= least) ?? [1, "bytes"];
  return `${(bytes / unit).toFixed(unit === 1 ? 0 : 1)} ${name}`;
}

// ---------------------------------------------------------------- the key

function askForKey(why) {
  keep(null);
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
  tell("");
  const error = await loadBridges();
  if (error) askForKey(error.message);
  else field.source.focus();
}

// ---------------------------------------------------------------- from here on, the page listens

function onKey(event) {
  if (event.key === "Escape" && running) running.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && find("key-form").hidden) {
    event.preventDefault();
    run();
  }
}

function submits(form, action) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
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
}

for (const column of document.querySelectorAll("article")) column.append(find("answer").content.cloneNode(true));
find("forget").hidden = !hasKey();
listen();
loadBridges();
