"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data"), figures = read("figures"), images = read("images"), colours = read("colours");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const dot = (entry) => {
  const element = make("span", { className: "dot" });
  element.style.background = `var(--e${entry % 8})`;
  return element;
};
const short = (name) => name.replace(/^embedded_/, "").replaceAll("_", " ");
const figure = (value) => {
  const size = Math.abs(value);
  return value.toFixed(size < 10 ? 3 : size < 100 ? 2 : 1).replace("-", "−");
};
const signed = (value) => (value < 0 ? "" : "+") + figure(value);

// A picture is [entry, copy, place in images or -1, width, height, file, scores].
const [ENTRY, COPY, PLACE, WIDTH, HEIGHT, FILE, SCORES] = [0, 1, 2, 3, 4, 5, 6];
const isSmall = (picture) => Math.max(picture[WIDTH], picture[HEIGHT]) <= 128;
const copyOf = (prompt, copy) => prompt.pictures.filter((picture) => picture[COPY] === copy);

const seen = new IntersectionObserver((changes) => {
  for (const change of changes) {
    if (change.isIntersecting) {
      change.target.src = images[change.target.dataset.place];
      seen.unobserve(change.target);
    }
  }
}, { rootMargin: "400px" });

function thumbnail(picture, prompt) {
  if (!picture || picture[PLACE] < 0) {
    return make("span", { className: "hole", textContent: picture ? "not in this page" : "no picture" });
  }
  const image = make("img", { alt: `${data.entries[picture[ENTRY]]}: ${prompt.text}` });
  image.dataset.place = picture[PLACE];
  seen.observe(image);
  return make("span", { className: isSmall(picture) ? "small" : "" }, image);
}

function difference(value) {
  const direction = value > 0 ? "up" : value < 0 ? "down" : "same";
  return make("span", { className: `difference ${direction}`, textContent: signed(value) });
}

// The pictures of one prompt as a button. entries: whose pictures are shown.
function card(list, index, entries, kind) {
  const [promptIndex, copy] = list[index], prompt = data.prompts[promptIndex];
  const own = copyOf(prompt, copy), shown = entries.map((entry) => own.find((picture) => picture[ENTRY] === entry));
  const row = make("span", { className: "row" });
  const inside = shown.some((picture) => picture && picture[PLACE] >= 0);
  entries.forEach((entry, i) => {
    const score = shown[i] ? figure(shown[i][SCORES][data.main]) : "–";
    const label = make("span", { className: "label" }, kind === "single" ? null : dot(entry), make("b", { textContent: score }));
    if (kind === "many") label.append(make("span", { className: "name", textContent: data.entries[entry] }));
    row.append(make("span", {}, inside ? thumbnail(shown[i], prompt) : null, label));
  });
  const button = make("button", { className: "card", type: "button" }, row, make("span", { className: "text", textContent: prompt.text }));
  button.setAttribute("aria-label", `Enlarge: ${prompt.text}`);
  const meta = make("span", { className: "meta" });
  if (kind === "pairs" && shown[0] && shown[1]) meta.append(difference(shown[1][SCORES][data.main] - shown[0][SCORES][data.main]));
  if (kind === "many") {
    meta.append(make("span", { textContent: `${prompt.set} ${prompt.line}` }));
    if (prompt.category) meta.append(make("span", { className: "tag", textContent: prompt.category }));
  }
  if (meta.childNodes.length) button.append(meta);
  button.addEventListener("click", () => enlarge(list, index));
  return button;
}

for (const box of all("[data-group]")) {
  const group = data[box.dataset.group][Number(box.dataset.place)], list = group[box.dataset.side];
  const [entries, kind] = box.dataset.group === "pairs" ? [[0, group.entry], "pairs"] : [[group.entry], "single"];
  box.append(...list.map((_, index) => card(list, index, entries, kind)));
}

// Enlarged: one prompt and copy of `shown`, all entries side by side.
let shown = [], at = 0;
const dialog = byId("enlarged");

function enlarge(list, index) {
  shown = list;
  at = index;
  fill();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function large(picture, prompt, columns) {
  const caption = make("figcaption", {}, dot(picture[ENTRY]), data.entries[picture[ENTRY]]);
  if (picture[PLACE] < 0) {
    return make("figure", {}, make("span", { className: "hole", textContent: picture[FILE] }), caption);
  }
  const image = make("img", { alt: `${data.entries[picture[ENTRY]]}: ${prompt.text}`, src: images[picture[PLACE]] });
  const space = Math.min(dialog.clientWidth || innerWidth, 1120) - (innerWidth > 640 ? 48 : 28);
  const perRow = innerWidth > 640 ? Math.min(columns, 4) : Math.min(columns, 2);
  const room = Math.min((space - 16 * (perRow - 1)) / perRow, Math.max(192, 0.56 * innerHeight));
  if (isSmall(picture)) { // whole multiples: every pixel as large as the next
    image.width = picture[WIDTH] * Math.max(1, Math.floor(room / Math.max(picture[WIDTH], picture[HEIGHT])));
  } else {
    image.width = Math.min(picture[WIDTH], room * Math.min(1, picture[WIDTH] / picture[HEIGHT]));
  }
  return make("figure", { className: isSmall(picture) ? "small" : "" }, image, caption);
}

function fill() {
  const [promptIndex, copy] = shown[at], prompt = data.prompts[promptIndex], own = copyOf(prompt, copy);
  const copies = new Set(prompt.pictures.map((picture) => picture[COPY])).size;
  const where = [`${at + 1} of ${shown.length}`, `${prompt.set} ${prompt.line}`];
  if (prompt.category) where.push(prompt.category);
  if (copies > 1) where.push(`picture ${copy + 1} of ${copies}`);
  byId("enlarged-where").textContent = where.join(" · ");
  byId("enlarged-title").textContent = prompt.text;
  byId("enlarged-pictures").replaceChildren(...own.map((picture) => large(picture, prompt, own.length)));
  const head = make("tr", {}, make("th", { textContent: "Score", scope: "col" }));
  for (const picture of own) head.append(make("th", { scope: "col" }, dot(picture[ENTRY]), data.entries[picture[ENTRY]]));
  const body = make("tbody");
  data.rewards.forEach((reward, r) => {
    const line = make("tr", {}, make("th", { textContent: short(reward), scope: "row" }));
    for (const picture of own) {
      const cell = make("td", {}, figure(picture[SCORES][r]) + " ");
      if (picture !== own[0] && own[0][ENTRY] === 0) cell.append(difference(picture[SCORES][r] - own[0][SCORES][r]));
      line.append(cell);
    }
    body.append(line);
  });
  const table = make("table", { className: "plain" }, make("thead", {}, head), body);
  byId("enlarged-scores").replaceChildren(own.length ? table : "No picture of this prompt was scored.");
  const answers = prompt.answers.map(([first, second, verdict, reply]) => {
    const names = [data.entries[first], data.entries[second]];
    const said = verdict === "first" ? names[0] : verdict === "second" ? names[1] : verdict;
    const line = make("div", {}, "Judge, shown ", make("b", { textContent: names[0] }), " then ", make("b", { textContent: names[1] }), ": ", make("b", { textContent: said }));
    if (reply) line.append(make("blockquote", { textContent: reply }));
    return line;
  });
  byId("enlarged-answers").replaceChildren(...answers);
}

function step(by) {
  at = (at + by + shown.length) % shown.length;
  fill();
}
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) {
    event.preventDefault();
    step(by);
  }
});

// The list of prompts: those with pictures inside the page come first.
const STEP = 24;
const hasPicture = (prompt) => copyOf(prompt, 0).some((picture) => picture[PLACE] >= 0);
const everyone = data.entries.map((_, entry) => entry);
const order = data.prompts.map((_, index) => index).sort((a, b) => hasPicture(data.prompts[b]) - hasPicture(data.prompts[a]) || a - b);
let matching = [], drawn = 0;

function search() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const set = byId("filter-set")?.value, category = byId("filter-category")?.value;
  matching = order.filter((index) => {
    const prompt = data.prompts[index], text = prompt.text.toLowerCase();
    return (!set || prompt.set === set) && (!category || prompt.category === category) && words.every((word) => text.includes(word));
  }).map((index) => [index, 0]);
  drawn = 0;
  byId("list").replaceChildren();
  more();
  const inside = matching.filter(([index]) => hasPicture(data.prompts[index])).length;
  const pictures = inside < matching.length ? `, ${inside.toLocaleString("en")} of them with pictures in this page` : "";
  byId("found").textContent = `${matching.length.toLocaleString("en")} of ${data.prompts.length.toLocaleString("en")} prompts${pictures}. Scores: ${short(data.rewards[data.main])}.`;
}

function more() {
  const end = Math.min(drawn + STEP, matching.length), cards = [];
  for (; drawn < end; drawn++) cards.push(card(matching, drawn, everyone, "many"));
  byId("list").append(...cards);
  byId("more").hidden = drawn === matching.length;
}
byId("filter").addEventListener("input", search);
byId("filter-set")?.addEventListener("change", search);
byId("filter-category")?.addEventListener("change", search);
byId("more").addEventListener("click", more);
search();

// Sets, categories and measures: what is picked is shown, everything else hidden.
const dark = matchMedia("(prefers-color-scheme: dark)");
const picked = { set: all("[data-set]").at(-1)?.dataset.set ?? "", category: "", measure: byId("measure")?.value };

function show() {
  for (const button of all("[data-pick-set]")) button.setAttribute("aria-pressed", button.dataset.pickSet === picked.set);
  for (const box of all("[data-set]")) {
    box.hidden = box.dataset.set !== picked.set || ("category" in box.dataset && box.dataset.category !== picked.category);
  }
  for (const box of all("[data-measure]")) box.hidden = box.dataset.measure !== picked.measure;
}
for (const button of all("[data-pick-set]")) {
  button.addEventListener("click", () => { picked.set = button.dataset.pickSet; show(); });
}
byId("category")?.addEventListener("change", (event) => { picked.category = event.target.value; show(); });
byId("measure")?.addEventListener("change", (event) => { picked.measure = event.target.value; show(); });
show();

// Plots are drawn where they come into view, in the page's colours.
function themed(name) {
  let text = JSON.stringify(name.split("|").reduce((tree, key) => tree[key], figures));
  if (dark.matches) {
    colours[0].forEach((light, i) => {
      const parts = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)).join(",");
      text = text.replaceAll(light, colours[1][i]).replaceAll(`rgba(${parts(light)}`, `rgba(${parts(colours[1][i])}`);
    });
    text = text.replaceAll("#f3f1ec", "#3a3d44");
  }
  const style = getComputedStyle(document.documentElement), css = (key) => style.getPropertyValue(key).trim();
  const drawing = JSON.parse(text);
  const axis = { gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, fixedrange: true };
  const hover = { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink"), size: 12 } };
  drawing.layout.template = { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis, hoverlabel: hover,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--muted") },
  } };
  return drawing;
}

function draw(box) {
  const { data: traces, layout } = themed(box.dataset.figure);
  Plotly.react(box, traces, layout, { responsive: true, displayModeBar: false });
}

function drawWhenSeen() {
  const watch = new IntersectionObserver((changes) => {
    for (const change of changes.filter((one) => one.isIntersecting)) {
      draw(change.target);
      change.target.dataset.drawn = "yes";
      watch.unobserve(change.target);
    }
  }, { rootMargin: "300px" });
  for (const box of all(".chart")) watch.observe(box);
  dark.addEventListener("change", () => all(".chart[data-drawn]").forEach(draw));
}

const links = new Map(all("nav a").map((link) => [link.getAttribute("href").slice(1), link]));
const reading = new IntersectionObserver((changes) => {
  for (const change of changes) links.get(change.target.id)?.classList.toggle("here", change.isIntersecting);
}, { rootMargin: "-30% 0px -69% 0px" });
for (const section of all("main > section")) reading.observe(section);
