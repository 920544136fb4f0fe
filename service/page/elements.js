// Small pieces of the page, and numbers in words. Whatever is put in is text, never markup.

export const find = (id) => document.getElementById(id);

/** An element of so many children; strings among them are text. */
export function make(tag, ...children) {
  const element = document.createElement(tag);
  element.append(...children);
  return element;
}

export const note = (text) => Object.assign(make("p", text), { className: "note" });

export function submits(form, action) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

/** One line for everyone; `aloud` is for screen readers, who should not hear every token. */
export function tell(place, line, { problem = false, aloud = "" } = {}) {
  const unseen = make("span", aloud);
  unseen.className = "unseen";
  place.replaceChildren(line, unseen);
  place.classList.toggle("problem", problem);
}

/** Bars of [name, count, unit, whether of a latent], the longest as wide as there is room. */
export function bars(rows) {
  const most = Math.max(...rows.map(([, count]) => count));
  return rows.map(([name, count, unit, isLatent]) => {
    const row = make("div", make("dt", name, make("b", `${whole(count)} ${unit}`)), make("dd"));
    row.className = isLatent ? "latent" : "";
    row.lastChild.style.width = `${(100 * count) / most}%`;
    return row;
  });
}

export const whole = (count) => count.toLocaleString("en");

export const ms = (time) => (time < 9950 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(1)} s`);

export function size(bytes) {
  const [unit, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([least]) => bytes >= least) ?? [1, "bytes"];
  return `${(bytes / unit).toFixed(unit === 1 ? 0 : 1)} ${name}`;
}
