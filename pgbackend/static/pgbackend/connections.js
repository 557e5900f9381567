// Keeps the page "Connections" up to date: once a second, while the page is seen and not paused.
"use strict";

(() => {
  const EVERY = 1000, SLOWEST = 15000, FORGET = 60000; // milliseconds
  const root = document.querySelector(".pgb");
  const find = (selector) => root.querySelector(selector);
  const pause = find("[data-pause]"), status = find("[data-status]");
  const processes = new Map(); // the last answer of each process, by its pid
  let pass = root.dataset.pass, chosen = Number(root.dataset.pid);
  let paused = false, failures = 0, timer = 0, asking = null, ended = false;

  // Announced by screen readers: only if it changes, which is seldom.
  function tell(text) {
    if (status.textContent !== text) status.textContent = text;
  }

  // --- Asking ---

  function ask(url) {
    asking = new AbortController();
    const wait = setTimeout(() => asking?.abort(), SLOWEST);
    return fetch(url, {
      headers: { "X-Pgbackend-Pass": pass, Accept: "application/json, text/plain" },
      credentials: "same-origin", redirect: "error", cache: "no-store", signal: asking.signal,
    }).finally(() => clearTimeout(wait));
  }

  async function update() {
    try {
      const answer = await ask(root.dataset.live);
      if (answer.status === 403) return stop();
      if (!answer.ok) throw new Error(String(answer.status));
      const data = await answer.json();
      failures = 0;
      pass = data.pass;
      processes.set(data.pid, { data, heard: Date.now() });
      show();
      if (!paused) tell("Live: new figures each second.");
    } catch {
      if (paused || document.hidden) return;
      failures += 1;
      tell("The server does not answer. These are the last figures; trying again.");
    } finally {
      asking = null;
      plan();
    }
  }

  function plan() {
    clearTimeout(timer);
    if (paused || ended || document.hidden) return;
    timer = setTimeout(update, Math.min(EVERY * 2 ** failures, SLOWEST));
  }

  function stop() {
    ended = true;
    pause.hidden = true;
    tell("You are signed out, or your permission has ended. Reload the page to sign in.");
  }

  // --- Showing ---

  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function show() {
    for (const [pid, { heard }] of processes) {
      if (Date.now() - heard > FORGET && pid !== chosen) processes.delete(pid);
    }
    if (!processes.has(chosen)) chosen = processes.keys().next().value;
    const { data } = processes.get(chosen);
    write(find("[data-pid-shown]"), String(data.pid));
    write(find("[data-at]"), data.at);
    for (const fact of root.querySelectorAll("[data-fact]")) {
      write(fact, data.facts[fact.dataset.fact] ?? "");
    }
    for (const [key, rows] of Object.entries(data.tables)) showTable(key, rows);
    showProcesses();
  }

  function showTable(key, rows) {
    const table = find(`[data-table="${key}"]`);
    if (!table) return;
    const body = table.tBodies[0];
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((row, number) => showRow(body.rows[number] ?? newRow(table, body), row));
    table.hidden = !rows.length;
    find(`[data-empty="${key}"]`).hidden = !!rows.length;
  }

  function newRow(table, body) {
    const row = body.insertRow();
    row.setAttribute("role", "row");
    [...table.tHead.rows[0].cells].forEach((heading, number) => {
      const cell = document.createElement(number ? "td" : "th");
      cell.setAttribute("role", number ? "cell" : "rowheader");
      if (!number) cell.scope = "row";
      cell.dataset.label = heading.textContent; // for the cards of a narrow window
      row.append(cell);
    });
    return row;
  }

  function showRow(row, { cells, alert }) {
    row.classList.toggle("pgb-alert", alert);
    cells.forEach((text, number) => write(row.cells[number], text));
  }

  function showProcesses() {
    const group = find("[data-processes]");
    group.hidden = processes.size < 2;
    for (const button of [...group.children]) {
      if (!processes.has(Number(button.dataset.pid))) button.remove();
    }
    for (const pid of processes.keys()) {
      let button = group.querySelector(`[data-pid="${pid}"]`);
      if (!button) {
        button = document.createElement("button");
        button.type = "button";
        button.className = "button";
        button.dataset.pid = pid;
        button.textContent = `Process ${pid}`;
        button.addEventListener("click", () => { chosen = pid; show(); });
        group.append(button);
      }
      button.setAttribute("aria-pressed", String(pid === chosen));
    }
  }

  // --- The dump ---

  const text = find("[data-dump-text]");
  const showDump = find("[data-dump-show]"), copyDump = find("[data-dump-copy]");

  showDump.addEventListener("click", async () => {
    try {
      const answer = await fetch(root.dataset.dump, {
        headers: { "X-Pgbackend-Pass": pass }, credentials: "same-origin", redirect: "error",
      });
      if (!answer.ok) throw new Error(String(answer.status));
      text.value = await answer.text();
    } catch {
      text.value = "The dump could not be read: the server does not answer, or you are signed out.";
    }
    text.hidden = copyDump.hidden = false;
  });

  copyDump.addEventListener("click", async () => {
    text.select();
    try {
      await navigator.clipboard.writeText(text.value);
    } catch { // without HTTPS there is no clipboard: what is selected can be copied by hand
      document.execCommand("copy");
    }
    write(copyDump, "Copied");
    setTimeout(() => write(copyDump, "Copy the dump"), 2000);
  });

  // --- The start ---

  pause.addEventListener("click", () => {
    paused = !paused;
    write(pause, paused ? "Resume" : "Pause");
    tell(paused ? "Paused." : "Live: new figures each second.");
    if (paused) asking?.abort();
    else failures = 0;
    clearTimeout(timer);
    if (!paused) update();
  });

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (document.hidden) asking?.abort();
    else if (!paused && !ended) update();
  });

  pause.hidden = showDump.hidden = false;
  update();
})();
