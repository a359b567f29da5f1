"use strict";
// The filters, and what a judge wrote. Everything else works without a script.
const form = document.querySelector(".filters");

function filter() {
  const checked = [...form.querySelectorAll("input:checked")].map((box) => box.name);
  const step = form.elements.step.value;
  let count = 0;
  for (const part of document.querySelectorAll(".step")) {
    let any = false;
    for (const card of part.querySelectorAll(".question")) {
      const passes = (name) => card.hasAttribute("data-" + name);
      card.hidden = (step && card.dataset.step !== step) || !checked.every(passes);
      any ||= !card.hidden;
      count += !card.hidden;
    }
    part.hidden = !any;
  }
  form.querySelector("output").textContent = count + " shown";
  document.querySelector(".none").hidden = count > 0;
}

if (form) {
  form.hidden = false;
  form.reset(); // a browser may remember what was checked
  form.addEventListener("change", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.unfold.addEventListener("click", ({ target }) => {
    const open = target.textContent === "Unfold all";
    for (const card of document.querySelectorAll("#questions .question:not([hidden])")) {
      card.open = open;
    }
    target.textContent = open ? "Fold all" : "Unfold all";
  });
  filter();
}

const dialog = document.querySelector("dialog");
document.addEventListener("click", ({ target }) => {
  if (target.dataset.raw === undefined) return;
  const row = target.closest("tr").querySelector("th").firstChild;
  dialog.querySelector("h3").textContent = target.getAttribute("aria-label");
  dialog.querySelector(".criterion").textContent = row.textContent;
  dialog.querySelector("pre").textContent = target.dataset.raw; // as text, never as HTML
  dialog.showModal();
});
