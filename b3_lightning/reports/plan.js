"use strict";
// Cards of clusters: built as elements, never as markup, a dozen at a time as the reader scrolls.
const data = JSON.parse(document.getElementById("data").textContent);
const [ID, QUERY, QUERY_CUT, QUERY_IMAGE, TARGET, TARGET_CUT, TARGET_IMAGE, FILLER] = [0, 1, 2, 3, 4, 5, 6, 7];
const A_TIME = 12;
const holder = document.getElementById("cards");
const more = document.getElementById("more");
const control = (name) => document.getElementById(name);
let found = [], shown = 0, words = [];

for (const cluster of data.clusters) {
  const texts = cluster.rows.map((row) => `#${row[ID]} ${row[QUERY]} ${row[TARGET]}`);
  cluster.words = lower(`cluster ${cluster.id} ${data.tasks[cluster.task]} ${texts.join(" ")}`);
}

function lower(text) {
  // as long as the text, so that what is found in the one is marked in the other
  const low = text.toLowerCase();
  if (low.length === text.length) return low;
  return Array.from(text, (letter) => (letter.toLowerCase().length === letter.length ? letter.toLowerCase() : letter)).join("");
}

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function marked(parent, text) {
  // the searched words, wherever they stand, as <mark>
  const low = lower(text);
  let at = 0;
  while (words.length && at < text.length) {
    let first = -1, length = 0;
    for (const word of words) {
      const place = low.indexOf(word, at);
      if (place >= 0 && (first < 0 || place < first)) { first = place; length = word.length; }
    }
    if (first < 0) break;
    parent.append(text.slice(at, first), make("mark", "", text.slice(first, first + length)));
    at = first + length;
  }
  parent.append(text.slice(at));
}

function cell(row, text, cut, image, side) {
  const td = make("td");
  if (row[image] >= 0) {
    const picture = make("img");
    picture.src = data.images[row[image]];
    picture.alt = row[text] ? "" : `${side} of row ${row[ID]}`;
    td.append(picture);
  }
  marked(td, row[text]);
  if (row[cut]) td.append(make("span", "cut", ` … ${row[cut].toLocaleString("en")} more characters`));
  return td;
}

function links(cluster, place, lines) {
  const own = cluster.links.filter((link) => link[0] === place);
  return own.map(([, other, gap, masked]) => {
    const row = cluster.rows[other][ID];
    const text = `target of #${row} scores ${gap < 0.01 ? "under 0.01" : gap.toFixed(2)} above${masked ? " (masked)" : ""}`;
    const button = make("button", masked ? "suspect masked" : "suspect", text);
    button.type = "button";
    button.addEventListener("click", () => {
      for (const line of lines) line.classList.remove("lit", "own");
      lines[place].classList.add("own");
      lines[other].classList.add("lit");
      const box = lines[other].closest(".body");
      box.scrollTo({ top: lines[other].offsetTop - box.clientHeight / 2, behavior: "smooth" });
    });
    return button;
  });
}

function card(cluster) {
  const article = make("article", "card");
  const head = make("header");
  head.append(make("h3", "", `Cluster ${cluster.id}`));
  if (data.tasks.length > 1) head.append(make("span", "chip", data.tasks[cluster.task]));
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  if (cluster.suspects) head.append(make("span", "chip bad", plural(cluster.suspects, "suspect")));
  if (cluster.masked) head.append(make("span", "chip", `${cluster.masked.toLocaleString("en")} masked`));
  head.append(make("span", "chip", `${(100 * cluster.cohesion).toFixed(1)}% of pairs are edges`));
  if (cluster.fillers) head.append(make("span", "chip", plural(cluster.fillers, "filler")));
  const table = make("table"), group = make("colgroup"), thead = make("thead"), top = make("tr"), tbody = make("tbody");
  group.append(make("col", "row"), make("col"), make("col"));
  for (const name of ["row", "query", "target"]) { const th = make("th", "", name); th.scope = "col"; top.append(th); }
  thead.append(top);
  const lines = cluster.rows.map((row) => {
    const tr = make("tr"), number = make("td", "", `#${row[ID]}`);
    if (row[FILLER]) number.append(make("span", "filler", "filler"));
    tr.append(number, cell(row, QUERY, QUERY_CUT, QUERY_IMAGE, "query"));
    tr.append(cell(row, TARGET, TARGET_CUT, TARGET_IMAGE, "target"));
    return tr;
  });
  lines.forEach((tr, place) => tr.lastChild.append(...links(cluster, place, lines)));
  tbody.append(...lines);
  table.append(group, thead, tbody);
  const body = make("div", "body");
  body.tabIndex = 0;
  body.setAttribute("role", "region");
  body.setAttribute("aria-label", `Rows of cluster ${cluster.id}`);
  body.append(table);
  article.append(head, body);
  return article;
}

const watcher = new IntersectionObserver((seen) => {
  if (seen[seen.length - 1].isIntersecting && shown < found.length) extend();
}, { rootMargin: "1200px" });

function extend() {
  const next = found.slice(shown, shown + A_TIME);
  holder.append(...next.map(card));
  shown += next.length;
  // watched anew, it tells again whether the end is near: a dozen small cards may not fill the window
  watcher.unobserve(more);
  watcher.observe(more);
}

const ORDERS = {
  suspects: (a, b) => b.suspects - a.suspects || b.masked - a.masked || a.cohesion - b.cohesion,
  loose: (a, b) => a.cohesion - b.cohesion || b.suspects - a.suspects,
  fillers: (a, b) => b.fillers - a.fillers || a.cohesion - b.cohesion,
  id: (a, b) => a.id - b.id,
};

// "#7" or "row 7", and "cluster 7", name one row and one cluster, not 70 as well
function holds(cluster, word) {
  const number = word.match(/^(?:#|row )(\d+)$/);
  if (number) return cluster.rows.some((row) => String(row[ID]) === number[1]);
  const named = word.match(/^cluster (\d+)$/);
  return named ? cluster.id === Number(named[1]) : cluster.words.includes(word);
}

function update() {
  const asked = lower(control("search").value).replace(/\s+/g, " ");
  words = asked.match(/(?:cluster|row) \d+(?!\S)|\S+/g) || [];
  const task = control("task") ? control("task").value : "";
  const why = control("why").value;
  found = data.clusters.filter((cluster) =>
    words.every((word) => holds(cluster, word)) &&
    (task === "" || cluster.task === Number(task)) && (why === "" || cluster.why === why));
  found.sort((a, b) => ORDERS[control("order").value](a, b) || a.id - b.id);
  holder.replaceChildren();
  shown = 0;
  extend();
  control("count").textContent = `${found.length.toLocaleString("en")} of ${data.clusters.length.toLocaleString("en")} clusters`;
  if (!found.length) holder.append(make("p", "note", "No cluster on this page holds that."));
}

let waiting = 0;
control("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
for (const name of ["order", "task", "why"]) if (control(name)) control(name).addEventListener("change", update);
control("controls").addEventListener("submit", (event) => event.preventDefault());
update();
