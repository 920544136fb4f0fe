// Documents that are pasted or come from files, kept a few at a time.

import { find, submits, tell, whole } from "./elements.js";
import { ask } from "./service.js";

const AT_ONCE = 16; // documents of one request
const TITLE = 120; // characters; more would not fit beside a latent in every alphabet
const FIRST_WORDS = 60;
let page = null; // what page.js lends
let adding = null; // the AbortController of what is being kept

async function add(take) {
  if (adding) return; // cancel it first
  adding = new AbortController();
  const { signal } = adding;
  const found = [];
  let [done, all] = [0, []];
  busy(true);
  try {
    all = [...pasted(), ...(await Promise.all([...find("new-files").files].map(fromFile))).flat()];
    if (!all.length) throw new Error("Paste a document or choose a file first.");
    find("add-progress").max = all.length;
    for (; done < all.length; done += AT_ONCE) {
      progress(done, all.length);
      found.push(...(await kept(all.slice(done, done + AT_ONCE), signal)));
    }
    find("add-form").reset();
    say(`${whole(all.length)} kept.`);
  } catch (error) {
    const before = done ? `${whole(done)} of ${whole(all.length)} are kept. ` : "";
    if (signal.aborted) say(`${before}Cancelled.`);
    else say(`${before}${error.message}`, { problem: true });
    page.refused(error);
  }
  adding = null;
  busy(false);
  if (found.length) take(found);
}

/** Let the service keep some documents: what it says of them. */
async function kept(documents, signal) {
  const body = {
    bridge: page.bridge()?.name,
    inputs: documents.map(({ text, title }) => ({ text, metadata: { title } })),
    ttl_seconds: find("new-forever").checked ? "forever" : undefined,
    truncate: find("new-cut").checked,
  };
  try {
    return (await (await ask("latents", body, signal)).json()).latents;
  } catch (error) {
    const at = /^inputs\.(\d+)/.exec(error.param ?? "");
    if (at) error.message = `“${documents[at[1]].title}”: ${error.message}`;
    throw error;
  }
}

function pasted() {
  const text = find("new-text").value;
  return text.trim() ? [titled(text, find("new-title").value)] : [];
}

async function fromFile(file) {
  const text = await file.text();
  if (!file.name.endsWith(".jsonl")) return [titled(text, file.name)];
  return text.split("\n").flatMap((line, at) => (line.trim() ? [fromLine(line, `${file.name}, line ${at + 1}`)] : []));
}

function fromLine(line, place) {
  let object = null;
  try {
    object = JSON.parse(line);
  } catch {} // said below
  if (typeof object?.text !== "string") throw new Error(`${place}: expected an object with a "text".`);
  return titled(object.text, object.title ?? object.id);
}

function titled(text, title) {
  const named = title === undefined || title === null ? "" : String(title).trim();
  return { text, title: start(named, TITLE) || start(text.slice(0, 1000).trim().replace(/\s+/g, " "), FIRST_WORDS) };
}

/** So many characters at most, none of them half. */
const start = (text, most) => Array.from(text.slice(0, 2 * most)).slice(0, most).join("");

function progress(done, all) {
  find("add-progress").value = done;
  say(`${whole(done)} of ${whole(all)} kept …`);
}

const say = (line, options) => tell(find("add-status"), line, options);

function busy(isBusy) {
  find("add").setAttribute("aria-disabled", isBusy);
  if (!isBusy && document.activeElement === find("add-cancel")) find("add").focus();
  find("add-cancel").hidden = find("add-progress").hidden = !isBusy;
}

export const cancel = () => adding?.abort();

/** Let documents be added; `take` gets what was kept, as the service tells of it. */
export function listen(lent, take) {
  page = lent;
  submits(find("add-form"), () => add(take));
  find("add-cancel").addEventListener("click", cancel);
}

export function clear() {
  cancel();
  say("");
}
