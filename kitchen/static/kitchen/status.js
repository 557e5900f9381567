// Shows the status page: the feed's numbers as figures, and the last minute of them as a picture.

import { listen, problem, send } from "./live.js";

const KEPT = 240; // a minute at four samples a second
const page = document.getElementById("status");
const canvas = page.querySelector("[data-chart]");
const samples = [];

function show(numbers) {
  for (const place of page.querySelectorAll("[data-number]")) {
    const value = place.dataset.number.split(".").reduce((part, name) => part[name], numbers);
    const text = value.toLocaleString("en");
    if (place.textContent !== text) place.textContent = text;
  }
  samples.push({ flight: numbers.in_flight, leased: numbers.pool.leased, most: numbers.pool.max_size });
  if (samples.length > KEPT) samples.shift();
  draw();
  showRush(numbers.rush);
}

/** Return a round number a little above `value`, for the top of the scale. */
function ceiling(value) {
  const magnitude = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  return [1, 2, 2.5, 5, 10].map((n) => n * magnitude).find((n) => n >= value);
}

function draw() {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const top = ceiling(Math.max(8, ...samples.map(({ flight, most }) => Math.max(flight, most))));
  const left = 34;
  const x = (index) => left + ((index + KEPT - samples.length) / (KEPT - 1)) * (width - left);
  const y = (value) => 8 + (1 - value / top) * (height - 16);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);

  pen.font = `12px ${style.fontFamily}`;
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  for (const value of [0, top / 2, top]) {
    pen.fillStyle = colour("faded");
    pen.fillText(String(value), left - 8, y(value));
    pen.fillStyle = colour("line");
    pen.fillRect(left, Math.round(y(value)), width - left, 1);
  }
  if (!samples.length) return;

  const trace = (name) => samples.forEach((sample, index) => pen.lineTo(x(index), y(sample[name])));
  pen.lineJoin = "round";
  pen.lineWidth = 2;

  pen.beginPath();
  pen.moveTo(x(0), y(0));
  trace("flight");
  pen.lineTo(x(samples.length - 1), y(0));
  pen.globalAlpha = 0.28;
  pen.fillStyle = colour("quince");
  pen.fill();
  pen.globalAlpha = 1;
  for (const [name, ink] of [["flight", "quince"], ["leased", "accent"]]) {
    pen.beginPath();
    trace(name);
    pen.strokeStyle = colour(ink);
    pen.stroke();
  }
}

function showRush(rush) {
  const place = page.querySelector("[data-progress]");
  const button = page.querySelector("[data-rush] button");
  place.hidden = !rush;
  if (button) button.disabled = Boolean(rush?.running);
  if (!rush) return;
  const { size, promised, unpromised, failed, running, seconds } = rush;
  const done = promised + unpromised + failed;
  place.querySelector("progress").value = done / size;
  const parts = [`${done} of ${size} orders answered in ${seconds.toFixed(1)} s`];
  if (unpromised) parts.push(`${unpromised} without a promise`);
  if (failed) parts.push(`${failed} failed`);
  const text = `${parts.join(", ")}${running ? "…" : "."}`;
  const words = place.querySelector("[data-progress-text]");
  if (words.textContent === text) return;
  // Announced once, when the rush is over, and not four times a second.
  words.setAttribute("aria-live", running ? "off" : "polite");
  words.textContent = text;
}

page.querySelector("[data-rush]")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { ok, message } = await send(event.target);
  problem(ok ? null : message);
});

addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
listen(page.dataset.feed, { numbers: show });
