// Fills the ticket beside the menu: the dishes chosen so far, and their total.

const form = document.querySelector(".ordering");
const money = (cents) => `€ ${(cents / 100).toFixed(2)}`;

function chosen() {
  return [...form.querySelectorAll(".dish")].flatMap((dish) => {
    const input = dish.querySelector("input");
    const quantity = Math.max(0, Math.trunc(Number(input.value) || 0));
    dish.classList.toggle("chosen", quantity > 0);
    const cents = Math.round(Number(dish.dataset.price) * 100) * quantity;
    return quantity ? [{ name: dish.dataset.name, quantity, cents }] : [];
  });
}

function line({ name, quantity, cents }) {
  const item = document.createElement("li");
  for (const [kind, text] of [["n", quantity], ["", name], ["price", money(cents)]]) {
    const part = document.createElement("span");
    part.className = kind;
    part.textContent = text;
    item.append(part);
  }
  return item;
}

function show() {
  const lines = chosen();
  const total = lines.reduce((sum, { cents }) => sum + cents, 0);
  const portions = lines.reduce((sum, { quantity }) => sum + quantity, 0);
  form.querySelector("[data-lines]").replaceChildren(...lines.map(line));
  form.querySelector("[data-nothing]").hidden = lines.length > 0;
  form.querySelector("[data-total-line]").hidden = !lines.length;
  form.querySelector("[data-to-ticket]").hidden = !lines.length;
  for (const place of form.querySelectorAll("[data-total]")) place.textContent = money(total);
  form.querySelector("[data-count]").textContent =
    `Your ticket: ${portions} ${portions === 1 ? "portion" : "portions"}`;
}

function step(button) {
  const input = button.parentElement.querySelector("input");
  const value = (Number(input.value) || 0) + Number(button.dataset.step);
  input.value = Math.min(Math.max(value, 0), Number(input.max)) || "";
  show();
}

function busy(on) {
  const button = form.querySelector("[data-send]");
  button.dataset.words ??= button.textContent;
  button.disabled = on;
  button.setAttribute("aria-busy", on);
  button.textContent = on ? button.dataset.busy : button.dataset.words;
}

if (form) {
  for (const button of form.querySelectorAll("[data-step]")) {
    button.hidden = false;
    button.addEventListener("click", () => step(button));
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", () => busy(true));
  // After "back" from the order's page, the browser may show this page just as it was left.
  addEventListener("pageshow", () => {
    busy(false);
    show();
  });
  document.getElementById("problems")?.focus();
}
