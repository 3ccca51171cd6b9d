"use strict";
(() => {
  const form = document.querySelector(".filter");
  const search = document.getElementById("search");
  const run = document.getElementById("run");
  const shown = document.getElementById("shown");
  const buttons = [...form.querySelectorAll("button[data-outcome]")];
  const rows = [...document.querySelectorAll("tr[data-contract]")];
  const details = new Map([...document.querySelectorAll("details[data-contract]")].map((one) => [one.dataset.contract, one]));
  const texts = new Map(rows.map((row) => {
    const detail = details.get(row.dataset.contract);
    return [row, `${row.textContent} ${detail ? detail.textContent : ""}`.toLowerCase()];
  }));

  function apply() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const column = run ? run.value : "";
    const outcomes = new Set(buttons.filter((one) => one.ariaPressed === "true").map((one) => one.dataset.outcome));
    for (const cell of document.querySelectorAll("#contracts [data-column], #details [data-column]")) {
      cell.hidden = column !== "" && cell.dataset.column !== column;
    }
    let count = 0;
    for (const row of rows) {
      const cells = [...row.querySelectorAll("td")].filter((one) => !one.hidden);
      const selected = cells.some((one) => (outcomes.size ? outcomes.has(one.dataset.outcome) : one.dataset.outcome));
      row.hidden = !(selected && words.every((word) => texts.get(row).includes(word)));
      count += row.hidden ? 0 : 1;
      const detail = details.get(row.dataset.contract);
      if (detail) detail.hidden = row.hidden;
    }
    for (const body of document.querySelectorAll(".matrix tbody")) {
      body.hidden = !body.querySelector("tr[data-contract]:not([hidden])");
    }
    shown.textContent = `${count} of ${rows.length} contracts`;
  }

  function open() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  }

  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.ariaPressed = button.ariaPressed === "true" ? "false" : "true";
      apply();
    });
  }
  search.addEventListener("input", apply);
  if (run) run.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", open);
  form.hidden = false;
  apply();
  open();
})();
