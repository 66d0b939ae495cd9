"use strict";

const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const read = (id) => JSON.parse(byId(id).textContent);
const data = read("data");
const figures = read("figures");
const images = read("images");
const colours = read("colours");

// ---- Elements and texts

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function dot(entry) {
  const element = make("span", { className: "dot" });
  element.style.background = `var(--e${entry % 8})`;
  return element;
}

const bold = (text) => make("b", { textContent: text });
const short = (name) => name.replace(/^embedded_/, "").replaceAll("_", " ");

function figure(value) {
  const size = Math.abs(value);
  const digits = size < 10 ? 3 : size < 100 ? 2 : 1;
  return value.toFixed(digits).replace("-", "−");
}

const signed = (value) => (value < 0 ? "" : "+") + figure(value);

function difference(value) {
  const direction = value > 0 ? "up" : value < 0 ? "down" : "same";
  return make("span", { className: `difference ${direction}`, textContent: signed(value) });
}

// ---- Pictures. Each is [entry, copy, index in images or -1, width, height, file, scores].

const [ENTRY, COPY, IMAGE, WIDTH, HEIGHT, FILE, SCORES] = [0, 1, 2, 3, 4, 5, 6];
const SMALL = 128; // pixels; smaller pictures are enlarged without smoothing
const isSmall = (picture) => Math.max(picture[WIDTH], picture[HEIGHT]) <= SMALL;
const mainScore = (picture) => picture[SCORES][data.main];
const copyOf = (prompt, copy) => prompt.pictures.filter((picture) => picture[COPY] === copy);
const altText = (picture, prompt) => `${data.entries[picture[ENTRY]]}: ${prompt.text}`;

// Thumbnails are decoded when they come near the visible part of the page.
const seen = new IntersectionObserver((changes) => {
  for (const change of changes) {
    if (change.isIntersecting) {
      change.target.src = images[change.target.dataset.image];
      seen.unobserve(change.target);
    }
  }
}, { rootMargin: "400px" });

function thumbnail(picture, prompt) {
  if (!picture || picture[IMAGE] < 0) {
    const text = picture ? "not in this page" : "no picture";
    return make("span", { className: "hole", textContent: text });
  }
  const image = make("img", { alt: altText(picture, prompt) });
  image.dataset.image = picture[IMAGE];
  seen.observe(image);
  return make("span", { className: isSmall(picture) ? "small" : "" }, image);
}

// ---- Cards: the pictures of one prompt as a button that enlarges them.
// list: [prompt, copy] of all cards beside it; entries: whose pictures are shown;
// kind: "pairs", "single" or "many".

function card(list, index, entries, kind) {
  const [promptIndex, copy] = list[index];
  const prompt = data.prompts[promptIndex];
  const pictures = copyOf(prompt, copy);
  const shown = entries.map((entry) => pictures.find((picture) => picture[ENTRY] === entry));
  const anyImage = shown.some((picture) => picture && picture[IMAGE] >= 0);

  const row = make("span", { className: "row" });
  entries.forEach((entry, i) => {
    const image = anyImage ? thumbnail(shown[i], prompt) : null;
    row.append(make("span", {}, image, cardLabel(entry, shown[i], kind)));
  });

  const text = make("span", { className: "text", textContent: prompt.text });
  const button = make("button", { className: "card", type: "button" }, row, text);
  button.setAttribute("aria-label", `Enlarge: ${prompt.text}`);
  const meta = cardMeta(prompt, shown, kind);
  if (meta.childNodes.length) button.append(meta);
  button.addEventListener("click", () => enlarge(list, index));
  return button;
}

function cardLabel(entry, picture, kind) {
  const score = bold(picture ? figure(mainScore(picture)) : "–");
  const label = make("span", { className: "label" }, kind === "single" ? null : dot(entry), score);
  if (kind === "many") {
    label.append(make("span", { className: "name", textContent: data.entries[entry] }));
  }
  return label;
}

function cardMeta(prompt, shown, kind) {
  const meta = make("span", { className: "meta" });
  if (kind === "pairs" && shown[0] && shown[1]) {
    meta.append(difference(mainScore(shown[1]) - mainScore(shown[0])));
  }
  if (kind === "many") {
    meta.append(make("span", { textContent: `${prompt.set} ${prompt.line}` }));
    if (prompt.category) {
      meta.append(make("span", { className: "tag", textContent: prompt.category }));
    }
  }
  return meta;
}

for (const box of all("[data-group]")) {
  const kind = box.dataset.group === "pairs" ? "pairs" : "single";
  const group = data[box.dataset.group][Number(box.dataset.place)];
  const list = group[box.dataset.side];
  const entries = kind === "pairs" ? [0, group.entry] : [group.entry];
  box.append(...list.map((_, index) => card(list, index, entries, kind)));
}

// ---- The dialog: one prompt and copy of `shown`, with all entries side by side

const dialog = byId("enlarged");
let shown = [];
let current = 0;

function enlarge(list, index) {
  shown = list;
  current = index;
  fillDialog();
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function fillDialog() {
  const [promptIndex, copy] = shown[current];
  const prompt = data.prompts[promptIndex];
  const pictures = copyOf(prompt, copy);

  const copies = new Set(prompt.pictures.map((picture) => picture[COPY])).size;
  const where = [`${current + 1} of ${shown.length}`, `${prompt.set} ${prompt.line}`];
  if (prompt.category) where.push(prompt.category);
  if (copies > 1) where.push(`picture ${copy + 1} of ${copies}`);

  const figures = pictures.map((picture) => largePicture(picture, prompt, pictures.length));
  const scores = pictures.length ? scoreTable(pictures) : "No picture of this prompt was scored.";
  byId("enlarged-where").textContent = where.join(" · ");
  byId("enlarged-title").textContent = prompt.text;
  byId("enlarged-pictures").replaceChildren(...figures);
  byId("enlarged-scores").replaceChildren(scores);
  byId("enlarged-answers").replaceChildren(...prompt.answers.map(judgeAnswer));
}

function largePicture(picture, prompt, columns) {
  const caption = make("figcaption", {}, dot(picture[ENTRY]), data.entries[picture[ENTRY]]);
  if (picture[IMAGE] < 0) {
    const hole = make("span", { className: "hole", textContent: picture[FILE] });
    return make("figure", {}, hole, caption);
  }
  const image = make("img", { alt: altText(picture, prompt), src: images[picture[IMAGE]] });
  image.width = largeWidth(picture, columns);
  return make("figure", { className: isSmall(picture) ? "small" : "" }, image, caption);
}

function largeWidth(picture, columns) {
  const isWide = innerWidth > 640;
  const space = Math.min(dialog.clientWidth || innerWidth, 1120) - (isWide ? 48 : 28);
  const perRow = Math.min(columns, isWide ? 4 : 2);
  const column = (space - 16 * (perRow - 1)) / perRow;
  const room = Math.min(column, Math.max(192, 0.56 * innerHeight));
  if (isSmall(picture)) {
    // Whole multiples, so that all pixels have the same size.
    const side = Math.max(picture[WIDTH], picture[HEIGHT]);
    return picture[WIDTH] * Math.max(1, Math.floor(room / side));
  }
  return Math.min(picture[WIDTH], room * Math.min(1, picture[WIDTH] / picture[HEIGHT]));
}

function scoreTable(pictures) {
  const head = make("tr", {}, make("th", { textContent: "Score", scope: "col" }));
  for (const picture of pictures) {
    head.append(make("th", { scope: "col" }, dot(picture[ENTRY]), data.entries[picture[ENTRY]]));
  }

  const first = pictures[0];
  const body = make("tbody");
  data.rewards.forEach((reward, r) => {
    const line = make("tr", {}, make("th", { textContent: short(reward), scope: "row" }));
    for (const picture of pictures) {
      const cell = make("td", {}, figure(picture[SCORES][r]) + " ");
      if (picture !== first && first[ENTRY] === 0) {
        cell.append(difference(picture[SCORES][r] - first[SCORES][r]));
      }
      line.append(cell);
    }
    body.append(line);
  });
  return make("table", { className: "plain" }, make("thead", {}, head), body);
}

function judgeAnswer([first, second, verdict, reply]) {
  const names = { first: data.entries[first], second: data.entries[second] };
  const line = make(
    "div", {}, "Judge, shown ", bold(names.first), " then ", bold(names.second), ": ",
    bold(names[verdict] ?? verdict),
  );
  if (reply) line.append(make("blockquote", { textContent: reply }));
  return line;
}

function step(by) {
  current = (current + by + shown.length) % shown.length;
  fillDialog();
}

byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
byId("close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) {
    event.preventDefault();
    step(by);
  }
});

// ---- The list of prompts: those with pictures inside the page come first

const STEP = 24;
const hasPicture = (index) => copyOf(data.prompts[index], 0).some((picture) => picture[IMAGE] >= 0);
const everyone = data.entries.map((_, entry) => entry);
const order = data.prompts.map((_, index) => index);
order.sort((a, b) => hasPicture(b) - hasPicture(a) || a - b);
let matching = [];
let drawn = 0;

function search() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const set = byId("filter-set")?.value;
  const category = byId("filter-category")?.value;
  const found = order.filter((index) => {
    const prompt = data.prompts[index];
    const text = prompt.text.toLowerCase();
    return (!set || prompt.set === set) && (!category || prompt.category === category)
      && words.every((word) => text.includes(word));
  });

  matching = found.map((index) => [index, 0]);
  drawn = 0;
  byId("list").replaceChildren();
  more();

  const count = (number) => number.toLocaleString("en");
  const withPictures = found.filter(hasPicture).length;
  let text = `${count(found.length)} of ${count(data.prompts.length)} prompts`;
  if (withPictures < found.length) {
    text += `, ${count(withPictures)} of them with pictures in this page`;
  }
  byId("found").textContent = `${text}. Scores: ${short(data.rewards[data.main])}.`;
}

function more() {
  const end = Math.min(drawn + STEP, matching.length);
  const cards = [];
  for (; drawn < end; drawn++) cards.push(card(matching, drawn, everyone, "many"));
  byId("list").append(...cards);
  byId("more").hidden = drawn === matching.length;
}

byId("filter").addEventListener("input", search);
byId("filter-set")?.addEventListener("change", search);
byId("filter-category")?.addEventListener("change", search);
byId("more").addEventListener("click", more);
search();

// ---- Sets, categories and measures: what is picked is shown, everything else hidden

const picked = {
  set: all("[data-set]").at(-1)?.dataset.set ?? "",
  category: "",
  measure: byId("measure")?.value,
};

function showPicked() {
  for (const button of all("[data-pick-set]")) {
    button.setAttribute("aria-pressed", button.dataset.pickSet === picked.set);
  }
  for (const box of all("[data-set]")) {
    const otherCategory = "category" in box.dataset && box.dataset.category !== picked.category;
    box.hidden = box.dataset.set !== picked.set || otherCategory;
  }
  for (const box of all("[data-measure]")) box.hidden = box.dataset.measure !== picked.measure;
}

function pick(key, value) {
  picked[key] = value;
  showPicked();
}

for (const button of all("[data-pick-set]")) {
  button.addEventListener("click", () => pick("set", button.dataset.pickSet));
}
byId("category")?.addEventListener("change", (event) => pick("category", event.target.value));
byId("measure")?.addEventListener("change", (event) => pick("measure", event.target.value));
showPicked();

// ---- Plots: drawn when they come into view, in the page's colours

const dark = matchMedia("(prefers-color-scheme: dark)");

// The figure "a|b|c" is figures.a.b.c.
function themed(name) {
  let text = JSON.stringify(name.split("|").reduce((tree, key) => tree[key], figures));
  if (dark.matches) text = darkened(text);

  const style = getComputedStyle(document.documentElement);
  const css = (key) => style.getPropertyValue(key).trim();
  const axis = {
    gridcolor: css("--grid"),
    linecolor: css("--line"),
    zeroline: false,
    automargin: true,
    fixedrange: true,
  };
  const hover = {
    bgcolor: css("--paper"),
    bordercolor: css("--line"),
    font: { color: css("--ink"), size: 12 },
  };
  const font = {
    family: getComputedStyle(document.body).fontFamily,
    size: 12,
    color: css("--muted"),
  };
  const clear = "rgba(0,0,0,0)";
  const drawing = JSON.parse(text);
  drawing.layout.template = {
    layout: {
      paper_bgcolor: clear, plot_bgcolor: clear, xaxis: axis, yaxis: axis, hoverlabel: hover, font,
    },
  };
  return drawing;
}

// A figure's JSON with every light colour replaced by its dark one.
function darkened(text) {
  const parts = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16)).join(",");
  colours[0].forEach((light, i) => {
    text = text.replaceAll(light, colours[1][i]);
    text = text.replaceAll(`rgba(${parts(light)}`, `rgba(${parts(colours[1][i])}`);
  });
  return text.replaceAll("#f3f1ec", "#3a3d44");
}

function draw(box) {
  const { data: traces, layout } = themed(box.dataset.figure);
  Plotly.react(box, traces, layout, { responsive: true, displayModeBar: false });
}

function drawWhenSeen() {
  const watch = new IntersectionObserver((changes) => {
    for (const change of changes) {
      if (change.isIntersecting) {
        draw(change.target);
        change.target.dataset.drawn = "yes";
        watch.unobserve(change.target);
      }
    }
  }, { rootMargin: "300px" });
  for (const box of all(".chart")) watch.observe(box);
  dark.addEventListener("change", () => all(".chart[data-drawn]").forEach(draw));
}

// ---- The navigation marks the section that is being read

const links = new Map(all("nav a").map((link) => [link.getAttribute("href").slice(1), link]));
const reading = new IntersectionObserver((changes) => {
  for (const change of changes) {
    links.get(change.target.id)?.classList.toggle("here", change.isIntersecting);
  }
}, { rootMargin: "-30% 0px -69% 0px" });
for (const section of all("main > section")) reading.observe(section);
