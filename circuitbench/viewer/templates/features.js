// Nothing is drawn that is not looked at: the rows of the list that are in view, and one feature.
const { bins, tokens: total, words, raw, features } = JSON.parse(document.getElementById("data").textContent);
const [find, scope, sort, count, list, spacer, main] = ["find", "scope", "sort", "count", "list", "spacer", "feature"].map(
  (id) => document.getElementById(id),
);
const ROW = 34;
const lower = raw.map((word) => word.toLowerCase());

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name === "text" ? (node.textContent = value) : node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function draw(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}
function number(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  let text;
  if (size >= 999.5) text = Math.round(value).toLocaleString("en-GB");
  else if (size && size < 1e-4) {
    const power = Math.floor(Math.log10(size));
    text = `${Number((value / 10 ** power).toPrecision(3))}·10${[...String(power)].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻").join("")}`;
  } else text = String(Number(value.toPrecision(3)));
  return text.replace("-", "−");
}
const share = (value) => `${number(100 * value)} %`;

// what a feature is found by
const all = new Map();
function vocabulary(f) {
  if (!all.has(f)) {
    const active = new Set();
    for (const [ids, on] of [...f.t, ...f.x.flatMap((one) => one[2])]) for (let j = 0; j < on.length; j += 2) active.add(ids[on[j]]);
    all.set(f, { active: [...active], up: f.p[0], down: f.s[0] });
  }
  return all.get(f);
}
function heads(f) {
  return [...new Set(f.t.map(([ids, , peak]) => ids[peak]))];
}
function matches(f, query, hit) {
  if (scope.value === "all" && /^#?\d+$/.test(query) && String(f.i) === query.replace("#", "")) return 2;
  const known = vocabulary(f);
  const where = scope.value === "all" ? Object.values(known) : [known[scope.value]];
  return where.some((ids) => ids.some((id) => hit[id])) ? 1 : 0;
}
const ORDER = {
  largest: (a, b) => b.m - a.m || a.i - b.i,
  dense: (a, b) => b.n - a.n || a.i - b.i,
  rare: (a, b) => !a.n - !b.n || a.n - b.n || a.i - b.i,
  index: (a, b) => a.i - b.i,
};

let shown = [];
let here = null;
function look() {
  const query = find.value.toLowerCase();
  const hit = lower.map((word) => word.includes(query));
  const found = query.trim() ? features.map((f) => [f, matches(f, query, hit)]).filter(([, score]) => score) : features.map((f) => [f, 1]);
  shown = found.sort((a, b) => b[1] - a[1] || ORDER[sort.value](a[0], b[0])).map(([f]) => f);
  count.textContent = query.trim() ? `${number(shown.length)} of ${number(features.length)} features` : `${number(features.length)} features`;
  spacer.style.height = `${shown.length * ROW}px`;
  list.scrollTop = 0;
  if (shown.length && !shown.includes(here)) choose(shown[0]);
  else reveal();
  rows();
}
function rows() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const drawn = [];
  for (let j = first; j < last; j++) {
    const f = shown[j];
    const on = make("span", { class: "on" });
    heads(f).slice(0, 4).forEach((id, k) => on.append(...(k ? [make("i", { text: "│" })] : []), words[id][1]));
    if (!f.n) on.textContent = "never active";
    const by = sort.value === "dense" || sort.value === "rare" ? share(f.d) : number(f.m);
    const row = make("div", { class: f.n ? "item" : "item silent", role: "option", id: `row-${f.i}`, "aria-selected": f === here });
    row.setAttribute("aria-posinset", j + 1);
    row.setAttribute("aria-setsize", shown.length);
    row.style.top = `${j * ROW}px`;
    row.append(make("b", { text: f.i }), on, make("span", { class: "by", text: f.n ? by : "" }));
    row.addEventListener("click", () => choose(f));
    drawn.push(row);
  }
  spacer.replaceChildren(...drawn);
  if (here) list.setAttribute("aria-activedescendant", `row-${here.i}`);
}
function reveal() {
  const top = shown.indexOf(here) * ROW;
  if (top < 0) return;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
}
function choose(f) {
  if (f === here) return;
  here = f;
  history.replaceState(null, "", `#${f.i}`);
  page(f);
  reveal();
  rows();
}
function move(step) {
  const next = shown[Math.max(0, Math.min(shown.length - 1, shown.indexOf(here) + step))];
  if (next) choose(next);
}

// one feature
function histogram(f) {
  const [width, height, left, bottom, top] = [330, 168, 34, 34, 8];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Histogram of ${f.n} activations` });
  const counts = Array(bins).fill(0);
  for (let j = 0; j < f.h.length; j += 2) counts[f.h[j]] = f.h[j + 1];
  const used = counts.findLastIndex((n) => n) + 1;
  const decades = Math.max(1, Math.ceil(Math.log10(Math.max(...counts) + 1)));
  const step = f.e / bins;
  const x = (bin) => left + (bin / used) * (width - left);
  const y = (n) => height - bottom - (n ? ((Math.log10(n) + 0.25) / (decades + 0.25)) * (height - bottom - top) : 0);
  for (let d = 0; d <= decades; d += Math.ceil(decades / 4)) {
    svg.append(draw("line", { class: "cb-grid", x1: left, x2: width, y1: y(10 ** d), y2: y(10 ** d) }));
    svg.append(draw("text", { class: "cb-tick", x: left - 6, y: y(10 ** d) + 3.5, "text-anchor": "end" }, number(10 ** d)));
  }
  svg.append(draw("line", { class: "cb-base", x1: left, x2: width, y1: y(0), y2: y(0) }));
  counts.slice(0, used).forEach((n, bin) => {
    if (!n) return;
    const bar = draw("rect", { class: "cb-bar", x: x(bin) + 0.4, y: y(n), width: Math.max(1, x(bin + 1) - x(bin) - 0.8), height: y(0) - y(n) });
    tips.set(bar, `${number(n)} ${n === 1 ? "token" : "tokens"}: ${number(bin * step)} to ${number((bin + 1) * step)}`);
    svg.append(bar);
  });
  const end = used * step;
  const size = 10 ** Math.floor(Math.log10(end / 3));
  const gap = [1, 2, 5, 10].map((k) => k * size).find((g) => end / g <= 5);
  for (let v = 0; v <= end * 1.001; v += gap) {
    svg.append(draw("text", { class: "cb-tick", x: x(v / step), y: height - bottom + 15, "text-anchor": "middle" }, number(Number(v.toPrecision(6)))));
  }
  svg.append(draw("text", { class: "cb-axis", x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "activation"));
  return svg;
}
function sided([ids, values], side, name) {
  const most = Math.max(...values.map(Math.abs), 1e-12);
  const rows = ids.map((id, j) => {
    const row = make("li", { class: side }, make("code", { text: words[id][1] }), make("em", { text: number(values[j]) }));
    row.style.setProperty("--v", Math.abs(values[j]) / most);
    return row;
  });
  return make("div", {}, make("h3", { text: name }), make("ol", { class: "words" }, ...rows));
}
function context([ids, on, peak, sequence, position], most) {
  const values = Object.fromEntries(Array.from({ length: on.length / 2 }, (_, j) => [on[2 * j], on[2 * j + 1]]));
  const text = make("span", { class: "cb-text", tabindex: 0 });
  ids.forEach((id, j) => {
    const value = values[j] ?? 0;
    const span = make("span", { text: words[id][0] });
    if (value) {
      span.classList.add("cb-on");
      span.style.setProperty("--v", Math.min(1, value / most).toFixed(3));
    }
    if (j === peak) span.classList.add("cb-peak");
    tips.set(span, `${words[id][1]}: ${number(value)}\nsequence ${sequence}, position ${position + j - peak}`);
    text.append(span);
  });
  return make("li", {}, make("span", { class: "value", text: number(values[peak] ?? 0) }), text);
}
function page(f) {
  hide();
  const inner = make("div", { class: "inner" }, make("h2", { text: `Feature ${f.i}` }));
  if (!f.n) inner.append(make("p", { class: "said", text: "Never active on this text." }));
  else {
    inner.append(
      make("p", { class: "said" }, "active on ", make("b", { text: share(f.d) }), ` of tokens (${number(f.n)} of ${number(total)}); largest activation `, make("b", { text: number(f.m) })),
    );
  }
  const over = make("div", { class: "over" });
  if (f.n) over.append(make("div", {}, make("h3", {}, "Activations ", make("span", { text: "tokens, on a log scale" })), histogram(f)));
  if (f.p[0].length) over.append(sided(f.p, "up", "Promotes"), sided(f.s, "down", "Suppresses"));
  inner.append(over);
  if (f.t.length) {
    inner.append(make("h3", {}, "Strongest contexts ", make("span", { text: "one a sequence" })));
    inner.append(make("ol", { class: "contexts" }, ...f.t.map((one) => context(one, f.m))));
  }
  if (f.x.length) inner.append(make("h3", {}, "Across its range ", make("span", { text: "drawn at random from each eighth" })));
  for (const [low, high, some] of f.x) {
    inner.append(make("h4", { text: `${number(low)} to ${number(high)}` }));
    inner.append(make("ol", { class: "contexts" }, ...some.map((one) => context(one, f.m))));
  }
  if (f.p[0].length) {
    inner.append(
      make("p", { class: "note", text: "Promotes, suppresses: change of a token’s logit for an activation of 1, less the mean of all tokens, along the direct path: the site’s output projection, the final norm’s gain, the unembedding. Left out: later layers, and the final norm’s division." }),
    );
  }
  main.replaceChildren(inner);
  main.scrollTop = 0;
}

// values on hover and by keyboard
const tips = new WeakMap();
const tip = document.body.appendChild(make("div", { class: "tip", role: "status" }));
function show(mark) {
  const box = mark.getBoundingClientRect();
  tip.textContent = tips.get(mark);
  tip.classList.add("on");
  tip.style.left = `${Math.max(6, Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 6))}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 10 ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
}
function hide() {
  tip.classList.remove("on");
  document.querySelector(".cb-here")?.classList.remove("cb-here");
}
addEventListener("mouseover", (event) => (tips.has(event.target) ? show(event.target) : tip.classList.remove("on")));
main.addEventListener("scroll", hide, { passive: true });
main.addEventListener("focusout", hide);
function walk(text, step) {
  const marks = [...text.children];
  const now = marks.findIndex((mark) => mark.classList.contains("cb-here"));
  const next = now < 0 ? Math.max(0, marks.findIndex((mark) => mark.classList.contains("cb-peak"))) : now + step;
  if (!marks[next]) return;
  hide();
  marks[next].classList.add("cb-here");
  show(marks[next]);
}
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === find;
  const text = event.target.closest?.(".cb-text");
  if (event.key === "Escape" && typing && find.value) (find.value = ""), look();
  else if (event.key === "Escape") hide(), list.focus();
  else if (event.key === "/" && !typing) find.focus(), find.select();
  else if (event.key === "Enter" && typing) list.focus();
  else if (text && (event.key === "ArrowRight" || event.key === "ArrowLeft")) walk(text, event.key === "ArrowRight" ? 1 : -1);
  else if (event.target.tagName === "SELECT") return;
  else if (event.key === "ArrowDown" || (event.key === "j" && !typing)) move(1);
  else if (event.key === "ArrowUp" || (event.key === "k" && !typing)) move(-1);
  else if (event.key === "PageDown" && event.target === list) move(Math.floor(list.clientHeight / ROW));
  else if (event.key === "PageUp" && event.target === list) move(-Math.floor(list.clientHeight / ROW));
  else if (event.key === "Home" && event.target === list) move(-shown.length);
  else if (event.key === "End" && event.target === list) move(shown.length);
  else return;
  event.preventDefault();
});
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
find.addEventListener("input", look);
scope.addEventListener("change", look);
sort.addEventListener("change", look);
list.addEventListener("scroll", rows, { passive: true });
addEventListener("resize", rows);
function asked() {
  const f = features.find((one) => `#${one.i}` === location.hash);
  if (f) choose(f);
}
addEventListener("hashchange", asked);
asked();
look();
