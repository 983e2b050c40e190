// Values on hover and by keyboard: Tab reaches a figure, the arrow keys walk its marks. Without this script they are plain tooltips.
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip", role: "status" }));
const texts = new WeakMap();
for (const mark of document.querySelectorAll(".cb-figure [title], .cb-text [title]")) {
  texts.set(mark, mark.title);
  mark.removeAttribute("title");
}
for (const title of document.querySelectorAll(".cb-plot title")) {
  texts.set(title.parentNode, title.textContent);
  title.remove();
}
function show(mark) {
  const box = mark.getBoundingClientRect();
  tip.textContent = texts.get(mark);
  tip.classList.add("on");
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  tip.style.left = Math.max(6, Math.min(left, innerWidth - tip.offsetWidth - 6)) + "px";
  tip.style.top = (box.top > tip.offsetHeight + 10 ? box.top - tip.offsetHeight - 6 : box.bottom + 6) + "px";
}
function hide() {
  tip.classList.remove("on");
  document.querySelector(".cb-here")?.classList.remove("cb-here");
}
addEventListener("mouseover", (event) => (texts.has(event.target) ? show(event.target) : tip.classList.remove("on")));
addEventListener("scroll", hide, { passive: true });
for (const figure of document.querySelectorAll("[data-keys], [data-grid]")) {
  const marks = [...figure.querySelectorAll("*")].filter((mark) => texts.has(mark));
  const width = "grid" in figure.dataset ? figure.querySelectorAll("thead th").length - 1 : 1;
  let here = -1;
  figure.tabIndex = 0;
  figure.addEventListener("blur", hide);
  figure.addEventListener("keydown", (event) => {
    const vertical = width > 1 ? width : 1;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: vertical, ArrowUp: -vertical, Home: -here, End: marks.length - 1 - here }[event.key];
    if (event.key === "Escape") hide();
    if (step === undefined || !marks.length) return;
    event.preventDefault();
    const next = here + (here < 0 ? 1 : step);
    if (next < 0 || next >= marks.length) return;
    here = next;
    hide();
    marks[here].classList.add("cb-here");
    show(marks[here]);
  });
}
