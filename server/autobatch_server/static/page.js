// Keeps the part of a page that changes up to date: asks for it again and again, and changes only what differs, so that
// neither the keyboard's focus nor the place on the page is lost. Without this script the page shows the same, once.
"use strict";

(() => {
  const live = document.getElementById("live");
  if (!live) return;
  const notice = document.getElementById("notice");
  const said = document.getElementById("said");

  const QUICK = 1000; // milliseconds between questions while something runs
  const SLOWEST = 5000; // and while nothing happens
  const PATIENCE = 10000; // after which an answer comes no more
  const BETWEEN_WORDS = 2000; // between sentences for who hears the page

  let tag = state().dataset.tag;
  let pause = QUICK;
  let timer = 0;
  let asking = false;
  let away = false;
  let over = false;
  let lastSeen = new Date();
  let ahead = clockAhead();
  let toSay = new Map();
  let lastSaid = 0;

  function state() {
    return document.getElementById("state");
  }

  // Seconds by which this machine's clock is ahead of the server's.
  function clockAhead() {
    return Date.now() / 1000 - Number(state().dataset.now);
  }

  function schedule(milliseconds) {
    window.clearTimeout(timer);
    if (!over && document.visibilityState === "visible") timer = window.setTimeout(ask, milliseconds);
  }

  async function ask() {
    if (asking) return;
    asking = true;
    try {
      const response = await fetch(live.dataset.fragment, {
        headers: { "If-None-Match": tag },
        cache: "no-store",
        signal: AbortSignal.timeout(PATIENCE),
      });
      await take(response);
    } catch {
      lose("The server does not answer.");
    } finally {
      asking = false;
      schedule(away ? 2 * QUICK : pause);
    }
  }

  async function take(response) {
    if (response.status === 304) {
      find();
      pause = state().dataset.busy === "yes" ? QUICK : Math.min(SLOWEST, pause * 1.5);
    } else if (response.ok) {
      const text = await response.text();
      tag = response.headers.get("ETag") ?? "";
      update(new DOMParser().parseFromString(text, "text/html").getElementById("state"));
      find();
      pause = QUICK;
      over = state().dataset.busy === "ended";
    } else if (response.status === 401) {
      over = true;
      tell("Your session has ended. ", "Sign in again");
    } else if (response.status === 404) {
      over = true;
      tell("What this page shows is no longer there.");
    } else {
      lose(response.status === 503 ? "The server cannot reach its database." : "The server failed.");
    }
  }

  function lose(what) {
    away = true;
    pause = QUICK;
    tell(`${what} What is shown is from ${lastSeen.toLocaleTimeString()}; trying again …`);
  }

  function find() {
    lastSeen = new Date();
    if (away) say("", "The server answers again.");
    away = false;
    notice.hidden = true;
  }

  function tell(text, link) {
    if (notice.textContent !== text + (link ?? "")) {
      notice.textContent = text;
      if (link) {
        const again = document.createElement("a");
        again.href = window.location.href;
        again.textContent = link;
        notice.append(again);
      }
    }
    notice.hidden = false;
  }

  // ---- what changed ---------------------------------------------------------------------------------------------

  function update(next) {
    if (!next) return;
    const before = sentences();
    const focused = live.contains(document.activeElement) ? document.activeElement : null;
    const row = focused?.closest("[data-say]")?.id;
    const section = focused?.closest("section")?.querySelector("h2")?.id;
    morph(state(), document.importNode(next, true));
    ahead = clockAhead();
    tick();
    if (focused && document.activeElement !== focused) refocus(focused, row, section);
    for (const [id, sentence] of sentences()) if (before.get(id) !== sentence) say(id, sentence);
  }

  // What had the focus may be gone: its probe's line is next, then the heading of where it was.
  function refocus(focused, row, section) {
    const line = row && document.getElementById(row);
    const target = focused.isConnected ? focused : (line?.querySelector("a, button") ?? document.getElementById(section));
    target?.focus({ preventScroll: true });
  }

  function morph(old, next) {
    for (const { name } of [...old.attributes]) if (!next.hasAttribute(name)) old.removeAttribute(name);
    for (const { name, value } of next.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    const wanted = new Set([...next.children].map((child) => child.id).filter(Boolean));
    for (const child of [...old.children]) if (child.id && !wanted.has(child.id)) child.remove();
    let at = old.firstChild;
    for (const child of [...next.childNodes]) {
      const same = child.id ? [...old.children].find((own) => own.id === child.id) : alike(at, child) ? at : null;
      if (!same) {
        old.insertBefore(child, at);
        continue;
      }
      if (same === at) at = at.nextSibling;
      else old.insertBefore(same, at);
      if (same.nodeType === Node.ELEMENT_NODE) morph(same, child);
      else if (same.nodeValue !== child.nodeValue) same.nodeValue = child.nodeValue;
    }
    while (at) {
      const rest = at.nextSibling;
      at.remove();
      at = rest;
    }
  }

  function alike(own, other) {
    return own && !own.id && own.nodeType === other.nodeType && own.nodeName === other.nodeName;
  }

  // ---- who hears the page -----------------------------------------------------------------------------------------

  function sentences() {
    return new Map([...live.querySelectorAll("[data-say]")].map((line) => [line.id, line.dataset.say]));
  }

  function say(id, sentence) {
    toSay.set(id, sentence);
  }

  function speak() {
    if (!toSay.size || Date.now() - lastSaid < BETWEEN_WORDS) return;
    const all = [...toSay.values()];
    const rest = all.length > 3 ? [`and ${all.length - 3} more changes`] : [];
    said.textContent = [...all.slice(0, 3), ...rest].join(". ");
    toSay = new Map();
    lastSaid = Date.now();
  }

  // ---- clocks -------------------------------------------------------------------------------------------------------

  function lasting(seconds) {
    const whole = Math.max(0, Math.floor(seconds));
    const two = (number) => String(number).padStart(2, "0");
    const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
    return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
  }

  function tick() {
    for (const clock of live.querySelectorAll("[data-since]")) {
      const text = lasting(Date.now() / 1000 - ahead - Number(clock.dataset.since));
      if (clock.textContent !== text) clock.textContent = text;
    }
  }

  // ---- cancelling without leaving the page ------------------------------------------------------------------------

  live.addEventListener("submit", async (event) => {
    const form = event.target;
    if (!form.hasAttribute("data-here")) return;
    event.preventDefault();
    const button = form.querySelector("button");
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    try {
      const response = await fetch(form.action, {
        method: "POST",
        headers: { "Content-Type": "application/x-www-form-urlencoded" },
        redirect: "manual",
        signal: AbortSignal.timeout(PATIENCE),
      });
      if (response.status === 409) say("", "The probe had already ended.");
      else if (response.type !== "opaqueredirect" && !response.ok) form.submit(); // the answer is a page that says why
    } catch {
      lose("The server does not answer; the probe was not cancelled.");
    }
    button.removeAttribute("aria-disabled");
    pause = QUICK;
    schedule(0);
  });

  document.addEventListener("visibilitychange", () => schedule(0));
  window.addEventListener("online", () => schedule(0));
  window.setInterval(() => {
    tick();
    speak();
  }, 500);
  over = state().dataset.busy === "ended";
  tick();
  schedule(QUICK);
})();
