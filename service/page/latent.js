// The latent as a heat map: its message decoded, painted, and explored with mouse, finger or arrow keys.

const FULL_COLOUR = 3; // encoders send slots of RMS 1, so that few numbers lie beyond
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const find = (id) => document.getElementById(id);

let latent = null; // the one on the map: { K, C, numbers, at }

/** Put the latent of a message (base64) on the map. */
export function showLatent(message) {
  latent = decode(message);
  find("map-summary").textContent = summary(latent);
  find("map").style.height = `${Math.min(360, Math.max(64, 20 * latent.K))}px`;
  point(null);
  paint();
}

/** Let the map be explored. */
export function listen() {
  find("map").addEventListener("pointermove", pointWithMouse);
  find("map").addEventListener("pointerdown", pointWithMouse);
  find("map").addEventListener("focus", () => point(latent.at ?? 0));
  find("map").addEventListener("keydown", pointWithKeys);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
}

/** The numbers of a message, row by row; the format is that of bridge/wire.py. */
export function decode(message) {
  const view = new DataView(Uint8Array.from(atob(message), (letter) => letter.charCodeAt(0)).buffer);
  const [dtype, K, C, start] = [view.getUint8(5), view.getUint32(24, true), view.getUint32(28, true), 36];
  const read = [
    (i) => view.getFloat32(start + 4 * i, true),
    (i) => half(view.getUint16(start + 2 * i, true)),
    (i) => view.getFloat32(start + 4 * Math.floor(i / C), true) * view.getInt8(start + 4 * K + i),
    (i) => quarter(view, start, K, C, Math.floor(i / C), i % C),
  ][dtype];
  return { K, C, numbers: Float32Array.from({ length: K * C }, (_, i) => read(i)), at: null };
}

function quarter(view, start, K, C, slot, channel) {
  const groups = Math.ceil(C / 32);
  const scale = half(view.getUint16(start + 2 * (slot * groups + Math.floor(channel / 32)), true));
  const byte = view.getUint8(start + 2 * K * groups + slot * Math.ceil(C / 2) + Math.floor(channel / 2));
  const whole = (byte >> (4 * (channel % 2))) & 15;
  return scale * (whole > 7 ? whole - 16 : whole);
}

function half(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, (bits & 1023) / 1024];
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
}

function summary({ K, C, numbers }) {
  const strongest = numbers.reduce((best, number, i) => (Math.abs(number) > Math.abs(numbers[best]) ? i : best), 0);
  return `${K} slots (rows) of ${C} channels (columns); the head turns each slot into one soft token. `
    + `The strongest number: ${describe(strongest, C, numbers)}.`;
}

function describe(at, C, numbers) {
  const sign = numbers[at] < 0 ? "−" : "+";
  return `slot ${Math.floor(at / C) + 1}, channel ${(at % C) + 1}: ${sign}${Math.abs(numbers[at]).toFixed(2)}`;
}

function paint() {
  if (!latent) return;
  const canvas = find("map");
  [canvas.width, canvas.height] = [latent.C, latent.K];
  const colour = colours(getComputedStyle(canvas));
  const image = new ImageData(latent.C, latent.K);
  latent.numbers.forEach((number, i) => image.data.set(colour(number), 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Blue below zero, orange above: told apart by the colour-blind too. */
function colours(style) {
  const rgb = (name) => style.getPropertyValue(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const [low, middle, high] = ["--low", "--middle", "--high"].map(rgb);
  return (number) => {
    const [end, share] = [number < 0 ? low : high, Math.min(1, Math.abs(number) / FULL_COLOUR)];
    return [...middle.map((from, i) => from + (end[i] - from) * share), 255];
  };
}

/** Point at a number of the map, by its index, or at none. */
function point(at) {
  const { K, C, numbers } = Object.assign(latent, { at });
  find("marker").hidden = at === null;
  if (at === null) return;
  const place = { left: (at % C) / C, top: Math.floor(at / C) / K, width: 1 / C, height: 1 / K };
  for (const [side, share] of Object.entries(place)) find("marker").style[side] = `${100 * share}%`;
  find("map-value").textContent = describe(at, C, numbers).replace("s", "S");
}

const clamp = (index, count) => Math.min(count - 1, Math.max(0, Math.floor(index)));

function pointWithMouse(event) {
  const { left, top, width, height } = find("map").getBoundingClientRect();
  const { K, C } = latent;
  point(clamp(((event.clientY - top) / height) * K, K) * C + clamp(((event.clientX - left) / width) * C, C));
}

function pointWithKeys(event) {
  if (!(event.key in STEPS)) return;
  event.preventDefault();
  const [{ K, C, at }, [down, right]] = [latent, STEPS[event.key]];
  point(clamp(Math.floor(at / C) + down, K) * C + clamp((at % C) + right, C));
}
