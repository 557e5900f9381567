// An order's page follows its order: news of it makes the page fetch itself anew.

import { wind } from "./clock.js";
import { coalesced, listen } from "./live.js";

const area = document.getElementById("order");

const refresh = coalesced(async () => {
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const fresh = page.getElementById("order");
  // Part by part, and only what differs: a screen reader announces what changed in the lead.
  [...area.children].forEach((part, index) => {
    if (steady(part) !== steady(fresh.children[index])) {
      part.innerHTML = fresh.children[index].innerHTML;
    }
  });
  wind();
});

/** What a part says, but for the ages in it, which run on by themselves. */
function steady(part) {
  const copy = part.cloneNode(true);
  for (const time of copy.querySelectorAll("[data-age]")) time.remove();
  return copy.innerHTML;
}

wind();
listen(area.dataset.events, { order: refresh, refresh });
