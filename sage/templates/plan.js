"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const AT_ONCE = 40;

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}
const percent = value => (100 * value).toFixed(1) + "%";
const number = value => value.toLocaleString("en-US");

/* Text with the words that are searched for marked. */
function marked(element, text, words) {
  const lower = text.toLowerCase();
  let place = 0;
  while (words.length && lower.length === text.length) {
    let first = -1, length = 0;
    for (const word of words) {
      const found = lower.indexOf(word, place);
      if (found >= 0 && (first < 0 || found < first)) { first = found; length = word.length; }
    }
    if (first < 0) break;
    element.append(text.slice(place, first), make("mark", "", text.slice(first, first + length)));
    place = first + length;
  }
  element.append(text.slice(place));
}

/* Colour of a node: brown for what is shared first, greener the later it parts. */
function colour(node) {
  return node.first === node.last ? "var(--leaf)" : `color-mix(in srgb, var(--bark), var(--leaf) ${Math.round(55 * node.start / data.calls)}%)`;
}

function place(element, rows, columns) {
  element.style.gridArea = `${rows[0] + 2} / ${columns[0] + 1} / ${rows[1] + 3} / ${columns[1] + 1}`;
  return element;
}

/* The lanes of a group: a lane for each picture, a column for each denoiser call. */
function lanes(group, words) {
  const box = make("ul", "lanes");
  box.style.gridTemplateColumns = `repeat(${data.calls}, minmax(0, 1fr)) minmax(0, ${data.calls * 1.15}fr)`;
  const scale = place(make("li", "scale"), [-1, -1], [0, data.calls]);
  scale.setAttribute("aria-hidden", "true");
  for (const call of [0, Math.round(data.calls / 2), data.calls]) scale.append(make("span", "", call));
  box.append(scale);
  for (const node of group.nodes) {
    const several = node.last > node.first;
    const text = several ? `${node.last - node.first + 1} pictures as one row, calls ${node.start} to ${node.end - 1}, similarity ${node.similarity.toFixed(2)}`
                         : `alone, calls ${node.start} to ${node.end - 1}`;
    const bar = place(make("li", several ? "node" : "node own"), [node.trunk, node.trunk], [node.start, node.end]);
    bar.title = text;
    bar.style.setProperty("--c", colour(node));
    if (several) {
      const cloud = place(make("li", node.trunk === node.last ? "cloud above" : "cloud"), [node.first, node.last], [node.start, node.end]);
      cloud.style.setProperty("--c", colour(node));
      cloud.setAttribute("aria-hidden", "true");
      cloud.title = text;
      cloud.append(make("b", "", node.similarity.toFixed(2)));
      box.append(cloud);
      bar.append(make("b", "", node.similarity.toFixed(2)));
      bar.setAttribute("aria-label", text);
    } else bar.setAttribute("aria-hidden", "true");
    box.append(bar);
  }
  group.members.forEach((leaf, lane) => {
    const item = place(make("li", leaf === group.trunk ? "text trunk" : "text"), [lane, lane], [data.calls, data.calls + 1]);
    const span = make("span");
    marked(span, data.prompts[leaf], words);
    if (data.notes[leaf]) span.append(make("small", "", data.notes[leaf]));
    item.title = data.prompts[leaf] + (leaf === group.trunk ? "\n(gives the noise)" : "");
    item.append(span);
    box.append(item);
  });
  return box;
}

function card(group, words) {
  const box = make("article", "card");
  box.append(make("h3", "", `Group ${group.number}`));
  const facts = make("p", "facts");
  facts.append(`${group.members.length} pictures · `, make("b", "", `${percent(group.saving)} saved`),
               ` (${number(group.rows)} rows) · similarity at least ${group.similarity.toFixed(2)} · expected loss ${group.loss.toFixed(5)}`);
  box.append(facts, lanes(group, words));
  return box;
}

const ORDER = {
  rows: (a, b) => b.rows - a.rows, saving: (a, b) => b.saving - a.saving, size: (a, b) => b.members.length - a.members.length,
  alike: (a, b) => b.similarity - a.similarity, unlike: (a, b) => a.similarity - b.similarity, loss: (a, b) => b.loss - a.loss,
};
let shown = [], drawn = 0, words = [];

function drawMore() {
  at("cards").append(...shown.slice(drawn, drawn + AT_ONCE).map(group => card(group, words)));
  drawn = Math.min(drawn + AT_ONCE, shown.length);
  at("more").hidden = drawn >= shown.length;
}

function matches(leaf) {
  const text = data.prompts[leaf].toLowerCase();
  return words.every(word => text.includes(word));
}

function update() {
  words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = data.groups.filter(group => group.members.some(matches)).sort((a, b) => ORDER[at("sort").value](a, b) || a.number - b.number);
  at("found").textContent = (words.length ? `${number(shown.length)} of ` : "") + (data.groups.length === 1 ? "1 group" : `${number(data.groups.length)} groups`);
  at("cards").replaceChildren();
  drawn = 0;
  drawMore();
  updateAlone();
}

function updateAlone() {
  const found = data.alone.filter(matches);
  at("alone").hidden = !data.alone.length;
  at("alone-count").textContent = (words.length ? `${number(found.length)} of ` : "") + (data.alone.length === 1 ? "1 picture alone" : `${number(data.alone.length)} pictures alone`);
  at("loners").replaceChildren(...(at("alone").open ? found : []).map(leaf => {
    const item = make("li");
    marked(item, data.prompts[leaf] + data.notes[leaf], words);
    return item;
  }));
}

/* The flat groups at every share: saving as bars, expected loss as a line. */
const curve = at("curve"), bars = [];
function drawCurve() {
  const { saving, expected_loss: loss } = data.flat, step = 100 / data.calls;
  const svg = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const name in attributes) element.setAttribute(name, attributes[name]);
    curve.append(element);
    return element;
  };
  const mostSaved = Math.max(...saving, 1e-9), mostLost = Math.max(...loss, 1e-12);
  saving.forEach((value, call) => {
    const height = Math.max(2, 96 * value / mostSaved);
    bars.push(svg("rect", { x: call * step, y: 100 - height, width: step * 0.85, height }));
  });
  svg("polyline", { points: loss.map((value, call) => `${(call + 0.42) * step},${98 - 94 * value / mostLost}`).join(" ") });
}

function showFlat() {
  const call = Number(at("share").value), { saving, expected_loss: loss } = data.flat;
  bars.forEach((bar, number) => bar.classList.toggle("on", number <= call));
  const text = `${Math.round(100 * call / data.calls)}% of the calls (${call} of ${data.calls})`;
  at("share").setAttribute("aria-valuetext", text);
  at("flat").replaceChildren(`${text}: `, make("b", "", `${percent(saving[call])} saved`), `, expected loss ${loss[call].toFixed(5)}, the cost of ${
    (data.calls * (1 - saving[call])).toFixed(1)} steps`);
}

for (const group of data.groups) group.nodes = group.nodes.map(([first, last, start, end, trunk, similarity]) =>
  ({ first, last, start, end, trunk, similarity }));
drawCurve();
at("share").max = data.calls - 1;
at("share").value = Math.min(data.share, data.calls - 1);
at("share").addEventListener("input", showFlat);
showFlat();
let waiting;
at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
at("sort").addEventListener("change", update);
at("whole").addEventListener("change", () => document.body.classList.toggle("whole", at("whole").checked));
at("alone").addEventListener("toggle", updateAlone);
at("more").addEventListener("click", drawMore);
new IntersectionObserver(entries => { if (entries.some(entry => entry.isIntersecting) && !at("more").hidden) drawMore(); },
  { rootMargin: "800px" }).observe(at("more"));
update();
