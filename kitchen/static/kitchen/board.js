// Updates the board: an event says that something changed, the server renders the board anew, and
// unchanged cards stay the same elements, so that focus and animation survive.

import { wind } from "./clock.js";
import { coalesced, listen, problem, send } from "./live.js";

const columns = document.getElementById("columns");
const announcer = document.querySelector("[data-announce]");
let unread = [];

const refresh = coalesced(async () => {
  const answer = await fetch(columns.dataset.columns);
  if (!answer.ok) throw new Error(`the board answered ${answer.status}`);
  const fresh = document.createElement("div");
  fresh.innerHTML = await answer.text();
  update(fresh);
  wind();
  announce();
});

/** Make the columns equal to those of `fresh`; move cards rather than making them again. */
function update(fresh) {
  const focused = document.activeElement?.closest?.(".card")?.id;
  const known = new Map([...columns.querySelectorAll(".card")].map((card) => [card.id, card]));
  for (const column of fresh.querySelectorAll(".column")) {
    const place = document.getElementById(column.id);
    for (const part of ["[data-count]", "[data-more]"]) {
      place.querySelector(part).textContent = column.querySelector(part).textContent;
    }
    const cards = [...column.querySelectorAll(".card")].map((card) => keepOrTake(card, known));
    place.querySelector(".cards").replaceChildren(...cards);
  }
  if (focused) refocus(focused);
}

function keepOrTake(card, known) {
  const old = known.get(card.id);
  if (old?.dataset.version === card.dataset.version) return old;
  card.classList.add("arrived");
  return card;
}

/** Move the focus with its card into the next column, or to the column if the card has left. */
function refocus(id) {
  if (document.activeElement?.closest(".card")?.id === id) return;
  const card = document.getElementById(id);
  const target = card?.querySelector("button") ?? card ?? document.getElementById("main");
  if (target === card) card.tabIndex = -1;
  target.focus();
}

/** Tell a screen reader what happened, without reading out a rush one by one. */
function announce() {
  if (!unread.length) return;
  const latest = new Map(unread.map((order) => [order.id, order]));
  unread = [];
  announcer.textContent =
    latest.size > 3
      ? `${latest.size} orders changed.`
      : [...latest.values()].map(sentence).join(" ");
}

function sentence({ id, guest, label, promised, created }) {
  if (created) return `New order ${id} for ${guest}.`;
  return `Order ${id} for ${guest}: ${label.toLowerCase()}${promised ? `, promised in ${promised} minutes` : ""}.`;
}

// A button that asks first: the first press changes its label, the second press acts.
function asked(button) {
  if (!button.dataset.ask) return true;
  const sure = button.dataset.words !== undefined;
  clearTimeout(button.patience);
  if (sure) {
    button.textContent = button.dataset.words;
    delete button.dataset.words;
  } else {
    button.dataset.words = button.textContent;
    button.textContent = button.dataset.ask;
    button.patience = setTimeout(() => asked(button), 4000);
  }
  return sure;
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.matches("[data-sends]")) return;
  event.preventDefault();
  const button = form.querySelector("button");
  if (button.getAttribute("aria-busy") === "true" || !asked(button)) return;
  button.setAttribute("aria-busy", "true");
  const { ok, message } = await send(form);
  button.removeAttribute("aria-busy");
  problem(ok ? null : message);
  refresh();
});

wind();
listen(columns.dataset.events, {
  order: (order) => {
    unread.push(order);
    refresh();
  },
  refresh,
});
