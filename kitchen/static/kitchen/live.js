// Reads a live stream of server-sent events, shows its state, and pauses while the page is hidden.

const WORDS = { live: "Live", wait: "Connecting…", lost: "Connection lost, trying again…" };

function say(state) {
  const pulse = document.querySelector(".pulse");
  if (!pulse || pulse.dataset.state === state) return;
  pulse.dataset.state = state;
  pulse.querySelector("[data-pulse-text]").textContent = WORDS[state];
}

/** Listen to `url`; `handlers` has a function for each event's name, which gets its data. */
export function listen(url, handlers) {
  let source = null;

  function open() {
    if (source) return;
    say("wait");
    source = new EventSource(url);
    source.onopen = () => say("live");
    source.onerror = () => {
      say("lost");
      // A starting server may give an answer that is no stream; that ends a browser's own attempts.
      if (source?.readyState === EventSource.CLOSED) {
        close();
        setTimeout(() => document.hidden || open(), 2000);
      }
    };
    // The server has lost its own connection to the database, or has it again.
    const own = { lost: () => say("lost"), refresh: () => say("live") };
    for (const name of new Set([...Object.keys(own), ...Object.keys(handlers)])) {
      source.addEventListener(name, (event) => {
        own[name]?.();
        handlers[name]?.(JSON.parse(event.data));
      });
    }
  }

  function close() {
    source?.close();
    source = null;
  }

  // A hidden page gives its connection back: a browser has six for all the pages of a host.
  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  open();
}

/** Post a form without leaving the page; resolves to {ok, message}. */
export async function send(form) {
  try {
    const answer = await fetch(form.action, {
      method: "POST",
      body: new FormData(form),
      headers: { Accept: "application/json" },
    });
    const { message } = await answer.json();
    return { ok: answer.ok, message };
  } catch {
    return { ok: false, message: "The server did not answer. Try again in a moment." };
  }
}

/** Show `message` as the page's problem, or none. */
export function problem(message) {
  const place = document.querySelector("[data-problem]");
  place.textContent = message ?? "";
  place.hidden = !message;
}

/** Call `work` soon and never twice at once; calls that arrive meanwhile become one more. */
export function coalesced(work, pause = 250) {
  let running = false;
  let again = false;
  return async function run() {
    again = true;
    if (running) return;
    running = true;
    while (again) {
      again = false;
      try {
        await work();
      } catch {
        // The network is away; the stream notices too, and a refresh comes when it is back.
      }
      await new Promise((done) => setTimeout(done, pause));
    }
    running = false;
  };
}
