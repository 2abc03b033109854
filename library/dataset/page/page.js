// Only narrows what is shown; the page is complete without it.
"use strict";

for (const tool of document.querySelectorAll("[data-filters][hidden], .needs-script[hidden]")) tool.hidden = false;

for (const box of document.querySelectorAll("[data-filters='rows']")) {
  const rows = [...box.parentElement.querySelectorAll("tbody tr")];
  box.addEventListener("input", () => {
    const wanted = box.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}

const words = document.querySelector("#card-words");
const kind = document.querySelector("#card-kind");
const count = document.querySelector("#card-count");

function narrow() {
  const wanted = words.value.trim().toLowerCase();
  let shown = 0;
  for (const bucket of document.querySelectorAll("details.bucket")) {
    let here = 0;
    for (const card of bucket.querySelectorAll(".card")) {
      const fits = !kind.value || card.dataset.kinds.split(" ").includes(kind.value);
      card.hidden = !(fits && (!wanted || card.textContent.toLowerCase().includes(wanted)));
      here += !card.hidden;
    }
    bucket.hidden = !here;
    shown += here;
  }
  count.textContent = wanted || kind.value ? `${shown} shown` : "";
}

if (words && kind && count) {
  words.addEventListener("input", narrow);
  kind.addEventListener("change", narrow);
}
