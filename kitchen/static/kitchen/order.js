// Keeps an order's page up to date: news of the order makes the page fetch itself anew.

import { wind } from "./clock.js";
import { coalesced, listen } from "./live.js";

const area = document.getElementById("order");

const refresh = coalesced(async () => {
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("order");
  // Only the parts that differ are replaced: a screen reader announces changes of the lead.
  [...area.children].forEach((part, index) => {
    if (steady(part) !== steady(fresh.children[index])) {
      part.innerHTML = fresh.children[index].innerHTML;
    }
  });
  wind();
});

/** Return the text of a part without its ages, which the clock updates. */
function steady(part) {
  const copy = part.cloneNode(true);
  for (const time of copy.querySelectorAll("[data-age]")) time.remove();
  return copy.innerHTML;
}

wind();
listen(area.dataset.events, { order: refresh, refresh });
