// The documents that are kept: listed page by page, found, chosen, deleted.

import * as adding from "./adding.js";
import * as asking from "./asking.js";
import { choose, isChosen, nameOf } from "./asking.js";
import { find, make, note, tell, whole } from "./elements.js";
import { ask } from "./service.js";

const PAGE = 50;
const MOST_ADDED = 200; // listed first
const MOST_SAID = 300; // characters of metadata
const PAUSE_MS = 250; // after a letter, before it is looked for
const UNITS = [["day", 86_400], ["hour", 3_600], ["minute", 60], ["second", 1]];
const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });

let page = null; // what page.js lends
let loading = null; // the AbortController of the list that is coming
let listed = []; // documents in the list, as GET /latents tells of them
let added = []; // those that this tab has added; they come first
let next = ""; // where the list goes on; null at its end

// ---------------------------------------------------------------- the list

/** List from the start, or go on. A search goes through all there is, part by part, until a page is full. */
export async function load({ more = false } = {}) {
  loading?.abort();
  loading = new AbortController();
  const { signal } = loading;
  const [containing, before] = [find("filter").value.trim(), more ? listed.length : 0];
  let unlisted = null;
  if (!more) [next, find("more").hidden] = ["", true];
  find("kept").setAttribute("aria-busy", true);
  say("Looking …");
  try {
    let first = !more;
    do {
      const query = new URLSearchParams({ limit: PAGE, after: next, containing });
      const part = await listing(query, signal);
      ({ next, unlisted } = part);
      if (first) begin(containing);
      first = false;
      append(part.latents.filter(({ id }) => !added.some((one) => one.id === id)));
    } while (next !== null && listed.length < before + PAGE);
    ended(containing, unlisted);
  } catch (error) {
    if (signal.aborted) return; // another one is on its way
    say(error.message, { problem: true });
    page.refused(error);
  }
  find("kept").setAttribute("aria-busy", false);
}

async function loadMore() {
  const before = listed.length;
  await load({ more: true });
  if (find("more").hidden) find("kept").children[before]?.querySelector("input").focus(); // the focus was on the button
}

/** A page of the list; of a store that lists nothing, an empty one that says so. */
async function listing(query, signal) {
  try {
    return await (await ask(`latents?${query}`, undefined, signal)).json();
  } catch (error) {
    if (error.status !== 422 || query.get("after")) throw error;
    return { latents: [], next: null, unlisted: error.message };
  }
}

function begin(containing) {
  listed = [];
  find("kept").replaceChildren();
  const words = containing.toLowerCase();
  append(added.filter((one) => `${nameOf(one)} ${one.id}`.toLowerCase().includes(words)));
}

function append(documents) {
  listed.push(...documents);
  find("kept").append(...documents.map(row));
}

function ended(containing, unlisted) {
  find("more").hidden = next === null;
  const why = unlisted ? `Not all can be shown: ${unlisted}. What is added here is, until this page is left.` : "";
  const none = containing ? `Nothing has “${containing}” in it.` : "Nothing is kept yet: add a document, or serve a corpus.";
  const count = listed.length ? `${whole(listed.length)} shown${next === null ? "" : "; there are more"}.` : none;
  say(why ? `${listed.length ? `${count} ` : ""}${why}` : count);
  if (!listed.length && !containing) find("adding").open = true;
}

function row(one) {
  const { id, excerpt, metadata } = one;
  const box = Object.assign(make("input"), { type: "checkbox", value: id, checked: isChosen(id) });
  box.disabled = !isOfBridge(one);
  box.addEventListener("change", () => choose(one, box.checked));
  const label = Object.assign(make("label", box, nameOf(one)), { className: "check" });
  const said = Object.entries(metadata ?? {}).filter(([name]) => name !== "title");
  const known = [...(nameOf(one) === id ? [] : [id]), ...said.map(([name, value]) => `${name}: ${shown(value)}`)];
  const lines = [excerpt ?? "", known.join(" · ").slice(0, MOST_SAID), facts(one).join(" · ")];
  return make("li", label, one.created ? deleting(one) : "", ...lines.filter(Boolean).map(note));
}

const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

const isOfBridge = (one) => one.bridge === page.bridge()?.name;

function facts(one) {
  const { id, bridge, source_tokens: tokens, shape, bytes, truncated, created, expires } = one;
  const until = expires ? `goes ${when(expires)}` : "until deleted";
  return [
    tokens === null ? "tokens not known" : `${whole(tokens)} tokens${truncated ? ", cut" : ""}`,
    `${whole(shape[0])} soft tokens`,
    `${whole(bytes)} bytes`,
    created ? `kept ${when(created)}, ${until}` : `corpus ${id.split("/")[0]}, read-only`,
    ...(isOfBridge(one) ? [] : [bridge ? `of bridge ${bridge}` : "of a bridge that is not served"]),
  ];
}

function when(time) {
  const seconds = Math.round((new Date(time) - Date.now()) / 1000);
  const [unit, length] = UNITS.find(([, least]) => Math.abs(seconds) >= least) ?? UNITS.at(-1);
  return relative.format(Math.trunc(seconds / length), unit);
}

// ---------------------------------------------------------------- deleting and adding

function deleting(one) {
  const button = Object.assign(make("button", "Delete"), { type: "button", className: "link" });
  button.setAttribute("aria-label", `Delete ${nameOf(one)}`);
  button.addEventListener("click", () => remove(one, button.closest("li")));
  return button;
}

async function remove(one, element) {
  if (!confirm(`Delete “${nameOf(one)}”?`)) return;
  try {
    await ask(`latents/${one.id}`, undefined, undefined, "DELETE");
  } catch (error) {
    say(error.message, { problem: true });
    page.refused(error);
    if (error.status !== 404) return; // what is gone already is not shown either
  }
  choose(one, false);
  [added, listed] = [added, listed].map((documents) => documents.filter(({ id }) => id !== one.id));
  const near = element.nextElementSibling ?? element.previousElementSibling;
  (near?.querySelector("input") ?? find("filter")).focus();
  element.remove();
}

/** What was added comes first: the list is in the order of ids, where it would be hard to find. */
async function take(documents) {
  const ids = new Set(documents.map(({ id }) => id));
  added = [...documents, ...added.filter(({ id }) => !ids.has(id))].slice(0, MOST_ADDED);
  await load();
}

// ---------------------------------------------------------------- for page.js

const say = (line, options) => tell(find("listed"), line, options);

/** Show which documents the chosen bridge can be asked about; those of others are no longer chosen. */
export function ofBridge() {
  asking.restrict(isOfBridge);
  find("kept").replaceChildren(...listed.map(row));
}

/** Show nothing of what a key let see that is gone. */
export function clear() {
  loading?.abort();
  [listed, added] = [[], []];
  find("kept").replaceChildren();
  find("more").hidden = true;
  say("");
  asking.clear();
  adding.clear();
}

export function cancel() {
  asking.cancel();
  adding.cancel();
}

export function listen(lent) {
  page = lent;
  let waiting = null;
  find("filter").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(load, PAUSE_MS);
  });
  find("more").addEventListener("click", loadMore);
  asking.listen(page);
  adding.listen(page, take);
}
