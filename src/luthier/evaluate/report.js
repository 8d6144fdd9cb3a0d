"use strict";
// The rows of a report: searched, filtered, sorted, a page at a time. Ours alone: no library, no network. What data and
// models say is only ever set as text (textContent), so nothing in it can become markup.

const PAGE = 10;
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("rows-data").textContent);
const TOKENS = new RegExp(data.tokens, "gu");
const EDGES = /^[^\p{L}\p{N}_]+|[^\p{L}\p{N}_]+$/gu;
const controls = $("explore");
const BASE = 0, TUNED = 1; // of the sides; any others have an answer and no score of their own
let found = [];
let start = 0;

// Scores and order.

const sign = (metric) => (data.metrics[metric].higher ? 1 : -1);
const score = (row, metric) => sign(metric) * row.scores[metric]?.[TUNED];
const gain = (row, metric) => score(row, metric) - sign(metric) * row.scores[metric]?.[BASE]; // NaN without a score

const ORDERS = {
  gain: (row, metric) => -gain(row, metric),
  loss: gain,
  best: (row, metric) => -score(row, metric),
  worst: score,
  longest: (row) => -row.words[TUNED],
  shortest: (row) => row.words[TUNED],
  file: () => 0,
};
const OUTCOMES = {
  better: (row, metric) => gain(row, metric) > 0,
  worse: (row, metric) => gain(row, metric) < 0,
  same: (row, metric) => gain(row, metric) === 0,
};

/** `rows` by an order's key; rows without a score come last, equal ones stay as in the file. */
function sorted(rows, order, metric) {
  const keyed = rows.map((row) => ({ row, key: ORDERS[order](row, metric) }));
  for (const one of keyed) if (Number.isNaN(one.key)) one.key = Infinity;
  return keyed.sort((one, two) => (one.key === two.key ? 0 : one.key - two.key)).map((one) => one.row);
}

// Search and filters.

const folded = (text) => text.toLowerCase().replace(/\s+/g, " ");
const texts = (row) => [row.prompt, ...row.answers, ...row.references, ...row.choices.map(([text]) => text), row.origin];
const searched = (row) => (row.folded ??= folded(texts(row).filter(Boolean).join("\n"))); // made when first needed

function passes(row, query, metric) {
  const shown = controls.outcome.value;
  if (shown.startsWith("cut-") && row.stopped[+shown.slice(4)] !== false) return false;
  if (shown in OUTCOMES && !OUTCOMES[shown](row, metric)) return false;
  for (const select of controls.querySelectorAll("[data-slice]"))
    if (select.value && String(row.slices[select.dataset.slice]) !== select.value.slice(1)) return false;
  return !query || searched(row).includes(query);
}

// Differences: the words of an answer that the nearest of some texts does not have in the same order.

/** Which of `said` lie on a longest common subsequence with `known`. The twin of `_shared` in rows.py. */
function shared(said, known) {
  if (said.length * known.length > data.cells) return said.map(() => true);
  const width = known.length + 1, best = new Uint16Array((said.length + 1) * width);
  for (let i = said.length - 1; i >= 0; i--)
    for (let j = known.length - 1; j >= 0; j--) {
      const at = i * width + j;
      best[at] = said[i] === known[j] ? best[at + width + 1] + 1 : Math.max(best[at + width], best[at + 1]);
    }
  const flags = said.map(() => false);
  for (let i = 0, j = 0; i < said.length && j < known.length; ) {
    if (said[i] === known[j]) { flags[i++] = true; j++; }
    else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i++;
    else j++;
  }
  return flags;
}

const tokens = (text) => text.match(TOKENS) ?? [];
const words = (text) => tokens(text).filter((t) => t.trim()).map((t) => t.toLowerCase().replace(EDGES, "") || t.toLowerCase());

/** `text` as nodes, words that no text of `others` has in the same order in <mark>. The twin of `marked` in rows.py. */
function marked(text, others) {
  let nearest = [], closest = -1;
  const said = words(text);
  for (const known of others.map(words)) {
    const flags = shared(said, known);
    const close = (2 * flags.filter(Boolean).length) / Math.max(1, said.length + known.length);
    if (close > closest) [nearest, closest] = [flags, close];
  }
  let word = 0;
  const all = tokens(text), flags = all.map((token) => (token.trim() ? nearest[word++] : null));
  const differs = (at) => flags[at] === false || (flags[at] === null && flags[at - 1] === false && flags[at + 1] === false);
  const stretches = [];
  all.forEach((token, at) => {
    if (at && stretches.at(-1).differs === differs(at)) stretches.at(-1).text += token;
    else stretches.push({ text: token, differs: differs(at) });
  });
  return stretches.map((one) => (one.differs ? element("mark", one.text) : one.text));
}

// Showing.

function element(name, text = "", style = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (style) made.className = style;
  return made;
}

const figure = (value) => (Math.abs(value) >= 1 ? value.toFixed(1) : String(+value.toPrecision(2)));
const moved = (row, name) => `${data.metrics[name].title} ${row.scores[name].map(figure).join(" → ")}`;

function article(row, metric) {
  const made = $("row").content.firstElementChild.cloneNode(true), part = (name) => made.querySelector(name);
  part(".origin").textContent = row.origin;
  const scored = Object.keys(row.scores).sort((one, two) => (two === metric) - (one === metric));
  part(".change").replaceChildren(...scored.map((name) => element(name === metric ? "b" : "span", moved(row, name))));
  part(row.prompt.length > data.long ? "p.prompt" : "details").remove();
  if (part("summary")) part("summary").textContent = row.prompt.slice(0, 160).replace(/\s+/g, " ") + " …";
  part(".prompt").textContent = row.prompt;
  if (row.references.length) part(".reference").append(...row.references.map((text) => element("p", text)));
  else part(".reference").remove();
  if (row.choices.length) part("tbody").append(...row.choices.map(choice));
  else part(".choices").remove();
  part(".sides").append(...data.sides.map((name, at) => side(row, name, at)).filter(Boolean));
  return made;
}

function choice([text, shares]) {
  const line = element("tr"), head = element("th", text);
  head.scope = "row";
  line.append(head, ...shares.map((share) => element("td", `${share} %`, "n")));
  return line;
}

function side(row, name, at) {
  if (row.answers[at] === null) return null;
  const made = element("div", "", at === TUNED ? "tuned" : ""), title = element("h4", `${name} `), text = element("p", "", "text");
  title.append(element("span", `${row.words[at]} word${row.words[at] === 1 ? "" : "s"}${row.stopped[at] === false ? ", cut off" : ""}`));
  const others = row.answers.filter((other, place) => place !== at && other !== null);
  const known = controls.against.value === "reference" ? row.references : others;
  text.append(...(row.answers[at] ? marked(row.answers[at], known) : [element("i", "an empty answer")]));
  made.append(title, text);
  return made;
}

/** Puts a highlight on what was searched for, where the browser can: it changes no element. */
function highlight(query) {
  if (!CSS.highlights) return;
  const ranges = [], walker = document.createTreeWalker($("list"), NodeFilter.SHOW_TEXT);
  while (query && walker.nextNode()) {
    const text = walker.currentNode.data.toLowerCase();
    for (let at = text.indexOf(query); at >= 0 && ranges.length < 200; at = text.indexOf(query, at + query.length)) {
      const range = new Range();
      range.setStart(walker.currentNode, at);
      range.setEnd(walker.currentNode, Math.min(at + query.length, walker.currentNode.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function show() {
  const metric = controls.metric.value, end = Math.min(start + PAGE, found.length);
  $("list").replaceChildren(...found.slice(start, end).map((row) => article(row, metric)));
  $("list").start = start + 1;
  const all = found.length === data.rows.length ? "" : ` of ${data.rows.length.toLocaleString("en")}`;
  $("count").textContent = found.length ? `${found.length.toLocaleString("en")}${all} rows` : "No row is like that.";
  $("place").textContent = found.length ? `${(start + 1).toLocaleString("en")} to ${end.toLocaleString("en")}` : "";
  $("pages").hidden = found.length <= PAGE;
  $("previous").disabled = start === 0;
  $("next").disabled = end === found.length;
  highlight(folded(controls.search.value).trim());
}

function update() {
  const metric = controls.metric.value, query = folded(controls.search.value).trim();
  found = sorted(data.rows.filter((row) => passes(row, query, metric)), controls.order.value, metric);
  start = 0;
  show();
}

function turn(pages) {
  const next = start + pages * PAGE;
  if (next < 0 || next >= found.length) return;
  start = next;
  show();
  $("list").focus({ preventScroll: true });
  $("list").scrollIntoView();
}

/** Makes what the search reads, a little at a time while the reader reads, and searches it once, which lays each text
 * out in one piece: else the first key waits for all of that. */
function prepare(from) {
  data.rows.slice(from, from + 250).forEach((row) => searched(row).includes("\n"));
  if (from + 250 < data.rows.length) setTimeout(prepare, 0, from + 250);
}

function keys(event) {
  const typing = event.target.matches("input, select, textarea");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); controls.search.focus(); }
  if ($("samples-all").contains(event.target) && event.key === "ArrowLeft") turn(-1);
  if ($("samples-all").contains(event.target) && event.key === "ArrowRight") turn(1);
}

controls.addEventListener("input", update);
controls.addEventListener("reset", () => setTimeout(update)); // after the fields have their first values again
controls.addEventListener("submit", (event) => { event.preventDefault(); $("list").focus(); });
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
document.addEventListener("keydown", keys);
if (!data.rows.some((row) => row.references.length)) controls.against.value = "other";
document.documentElement.classList.add("scripted");
update();
setTimeout(prepare, 0, 0);
