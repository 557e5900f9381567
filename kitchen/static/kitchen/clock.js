// Keeps counting the ages that the server wrote, by this machine's clock but not its time of day.

function text(seconds) {
  const two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  const tail = two(Math.floor(seconds % 60));
  return hours ? `${hours}:${two(minutes % 60)}:${tail}` : `${minutes}:${tail}`;
}

function tick() {
  for (const time of document.querySelectorAll("[data-age]")) {
    time.began ??= performance.now() / 1000 - Number(time.dataset.age);
    const age = performance.now() / 1000 - time.began;
    time.textContent = text(age);
    const promise = time.parentElement.querySelector("[data-promise]");
    if (promise && age > Number(promise.dataset.promise) * 60) {
      time.closest(".card")?.classList.add("late");
      if (!promise.textContent.endsWith("late")) promise.append(", late");
    }
  }
}

/** Start the clock; call it again after new ages have come into the page. */
export function wind() {
  tick();
  wind.timer ??= setInterval(tick, 1000);
}
