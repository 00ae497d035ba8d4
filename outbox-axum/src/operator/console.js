const $ = (id) => document.getElementById(id);
// Without what stands before the @ of an address like user:token@host: a request to that is refused by the browser.
const api = location.origin + "/outbox/api";

async function call(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(api + path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `the server answered ${response.status}`);
  return answer;
}

// All text goes in as text: nothing from the database is ever markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const row = (...cells) => element("tr", {}, ...cells.map((cell) => cell instanceof HTMLTableCellElement ? cell : element("td", {}, cell)));
const number = (value, bad) => element("td", { class: bad ? "n bad" : "n" }, value);
const fill = (id, rows, columns, empty) =>
  $(id).replaceChildren(...(rows.length ? rows : [element("tr", {}, element("td", { class: "empty", colspan: columns }, empty))]));
const time = (text) => element("time", { datetime: text, title: text }, text ? new Date(text).toLocaleString("sv-SE") : "–");
const error = (text) => element("div", { class: "error", title: text }, text || "–");
const thousands = (count) => count.toLocaleString("en-US");
const plural = (count, one, many = one + "s") => `${thousands(count)} ${count === 1 ? one : many}`;

function duration(seconds) {
  if (seconds == null) return "–";
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * length) return `${Math.floor(seconds / length)} ${unit}`;
  }
  return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
}

let hiding;
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => { $("toast").hidden = true; }, 6000);
}
const safely = (work) => async (...given) => {
  try { await work(...given); } catch (failure) { toast(failure.message); }
};

// Given: a title, a text, what the button says. Answers the reason, or null.
function confirmed(title, text, button, danger) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = button;
  $("confirm-yes").className = danger ? "danger" : "";
  $("confirm-reason").value = "";
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? $("confirm-reason").value : null), { once: true });
  });
}

// What must not be sent when it is empty is not there.
function given(form) {
  const fields = {};
  for (const [name, value] of new FormData(form)) {
    const text = value.trim();
    if (text) fields[name] = name === "since" || name === "until" ? new Date(text).toISOString() : text;
  }
  return fields;
}

// Subscriptions

function state(each) {
  if (each.paused) return element("span", { class: "warn" }, "paused");
  if (each.circuit !== "closed") return element("span", { class: "bad" }, each.circuit === "open" ? "destination down" : "trying destination");
  return element("span", { class: "good" }, "running");
}

async function refresh() {
  let status;
  try {
    status = await call("/status");
  } catch (failure) {
    $("health").textContent = `No answer: ${failure.message}`;
    $("health").className = "bad";
    return;
  }
  const alive = status.workers.filter((worker) => worker.last_seen_seconds < 15);
  const unserved = status.subscriptions.filter((each) => !alive.some((worker) => worker.subscriptions.includes(each.name)));
  fill("subscription-rows", status.subscriptions.map((each) => row(
    element("b", {}, each.name),
    unserved.includes(each) ? element("td", {}, state(each), element("div", { class: "bad" }, "no worker")) : state(each),
    number(thousands(each.pending)),
    number(duration(each.oldest_pending_age_seconds), each.oldest_pending_age_seconds > 300),
    number(thousands(each.leased)),
    number(thousands(each.dead), each.dead > 0),
    number(each.delivered >= 1e6 ? "1,000,000+" : thousands(each.delivered)),
    error(each.last_error),
    element("td", { class: "tight" }, element("button", { onclick: safely(() => toggle(each)) }, each.paused ? "Resume" : "Pause")),
  )), 9, "No subscriptions: events go nowhere until a worker registers one.");
  $("workers").textContent = alive.length
    ? `${plural(alive.length, "worker")}: ${alive.map((worker) => worker.id).join(", ")}`
    : "No worker was seen in the last 15 seconds: nothing is delivered until one runs.";
  health(status.subscriptions, unserved, status.unrouted, alive);
  safely(deadChanged)(status.subscriptions);
  const select = $("dead-filter").elements.subscription;
  const names = status.subscriptions.map((each) => each.name);
  if ([...select.options].slice(1).map((option) => option.value).join() !== names.join()) {
    const chosen = select.value;
    select.replaceChildren(element("option", { value: "" }, "all"), ...names.map((name) => element("option", { value: name }, name)));
    select.value = names.includes(chosen) ? chosen : "";
  }
}

function health(subscriptions, unserved, unrouted, alive) {
  const problems = [];
  const stuck = unrouted.waiting > 0 && (!alive.length || unrouted.oldest_age_seconds > 30);
  if (stuck) problems.push(`${plural(unrouted.waiting, "event")} not routed yet${alive.length ? "" : ": no worker is running"}`);
  if (unrouted.set_aside) problems.push(`${plural(unrouted.set_aside, "event")} could not be routed (outbox unrouted)`);
  const dead = subscriptions.reduce((sum, each) => sum + each.dead, 0);
  const names = (list) => list.map((each) => each.name).join(", ");
  const paused = subscriptions.filter((each) => each.paused);
  const down = subscriptions.filter((each) => each.circuit !== "closed");
  const late = subscriptions.filter((each) => !each.paused && each.oldest_pending_age_seconds > 300);
  if (unserved.length) problems.push(`no worker for ${names(unserved)}`);
  if (down.length) problems.push(`destination down: ${names(down)}`);
  if (dead) problems.push(plural(dead, "dead letter"));
  if (paused.length) problems.push(`paused: ${names(paused)}`);
  if (late.length) problems.push(`late: ${names(late)}`);
  $("health").textContent = problems.length ? problems.join(" · ") : "All is well";
  $("health").className = problems.length ? (unserved.length || dead || down.length || stuck || unrouted.set_aside ? "bad" : "warn") : "good";
}

async function toggle(each) {
  const action = each.paused ? "resume" : "pause";
  const text = each.paused
    ? `Delivery goes on with ${plural(each.pending, "pending delivery", "pending deliveries")}.`
    : "Nothing more is delivered to it until somebody resumes it. Events go on being collected; what is under way ends.";
  const reason = await confirmed(`${each.paused ? "Resume" : "Pause"} ${each.name}?`, text, each.paused ? "Resume" : "Pause");
  if (reason === null) return;
  await call(`/subscriptions/${encodeURIComponent(each.name)}/${action}`, { reason });
  toast(`${each.name} is ${each.paused ? "running again" : "paused"}`);
  await Promise.all([refresh(), changes()]);
}

// Dead letters

let dead = { filter: {}, next: null, chosen: new Set(), pages: 0 };
let known = null;

// When others died meanwhile, unless somebody is looking at a later page or has chosen some.
async function deadChanged(subscriptions) {
  const now = subscriptions.map((each) => `${each.name} ${each.dead}`).join();
  const changed = known !== null && known !== now;
  known = now;
  if (changed && dead.pages <= 1 && !dead.chosen.size) await deadLetters(false);
}

async function deadLetters(more) {
  if (!more) dead = { filter: given($("dead-filter")), next: null, chosen: new Set(), pages: 0 };
  dead.pages += 1;
  const query = new URLSearchParams({ ...dead.filter, limit: 50 });
  if (more) query.set("cursor", dead.next);
  const page = await call(`/dead-letters?${query}`);
  dead.next = page.next;
  const rows = page.items.map((item) => row(
    element("td", { class: "tight" }, element("input", { type: "checkbox", "data-id": item.id, "aria-label": `select ${item.id}`, onchange: chosen })),
    element("td", { class: "tight" }, time(item.died_at)), item.subscription,
    item.event_id
      ? element("button", { class: "link", onclick: safely(() => show(item.event_id)) }, item.event_type || item.event_id)
      : element("span", { class: "bad" }, "the event is gone or unreadable"),
    item.aggregate_id == null ? "–" : `${item.aggregate_type}/${item.aggregate_id}`, number(item.attempts), error(item.error),
  ));
  if (more) $("dead-rows").append(...rows);
  else fill("dead-rows", rows, 7, "No dead letters.");
  $("dead-more").hidden = !dead.next;
  $("filter-actions").hidden = !rows.length && !more;
  $("dead-all").checked = false;
  chosen();
}

function chosen() {
  const boxes = [...$("dead-rows").querySelectorAll("input:checked")];
  dead.chosen = new Set(boxes.map((box) => box.dataset.id));
  $("selected-actions").hidden = !dead.chosen.size;
}

async function act(action, which) {
  const body = which === "ids" ? { ids: [...dead.chosen] } : { filter: dead.filter };
  const { matched } = await call(`/dead-letters/${action}`, { ...body, dry_run: true });
  const count = plural(matched, "dead letter");
  if (!matched) return toast("There are none any more.");
  const names = Object.entries(dead.filter).map(([name, value]) => `${name} ${value}`).join(", ");
  const what = which === "ids" ? "" : ` This is everything that matches: ${names || "no filter, so all of them"}.`;
  const text = action === "replay"
    ? `They are delivered again at once, with all their attempts.${what}`
    : `Their deliveries are given up for good. The events stay.${what}`;
  const title = action === "replay" ? `Replay ${count}?` : `Discard ${count}?`;
  const reason = await confirmed(title, text, title.slice(0, -1), action === "discard");
  if (reason === null) return;
  const { changed } = await call(`/dead-letters/${action}`, { ...body, reason });
  toast(`${action === "replay" ? "Replayed" : "Discarded"}: ${changed} of ${matched}`);
  await Promise.all([refresh(), deadLetters(false), changes()]);
}

// Events

let found = { filter: {}, next: null };

async function events(more) {
  if (!more) found = { filter: given($("event-filter")), next: null };
  const { id, ...filter } = found.filter;
  if (id) return show(id);
  const query = new URLSearchParams({ ...filter, limit: 20 });
  if (more) query.set("cursor", found.next);
  const page = await call(`/events?${query}`);
  found.next = page.next;
  const rows = page.items.map((item) => row(
    element("td", { class: "tight" }, time(item.recorded_at)),
    item.id ? element("button", { class: "link", onclick: safely(() => show(item.id)) }, item.event_type || item.id)
      : item.event_type || "–",
    `${item.aggregate_type || "–"}/${item.aggregate_id || "–"}`, item.actor ? `${item.actor.kind}/${item.actor.id}` : "–",
    element("span", item.unreadable ? { class: "bad" } : { class: "mono" }, item.unreadable || item.id),
  ));
  if (more) $("event-rows").append(...rows);
  else fill("event-rows", rows, 5, "No events match.");
  $("event-more").hidden = !page.next;
}

async function show(id) {
  const path = `/events/${encodeURIComponent(id)}`;
  const [event, whys] = await Promise.all([call(path), call(`${path}/why`)]);
  $("event-title").textContent = event.event_type || "Unreadable event";
  const facts = [
    event.id, event.aggregate_id && `${event.aggregate_type}/${event.aggregate_id}`,
    event.recorded_at && `recorded ${new Date(event.recorded_at).toLocaleString("sv-SE")}`,
    event.tenant && `tenant ${event.tenant}`, event.actor && `by ${event.actor.kind}/${event.actor.id}`,
    event.correlation_id && `correlation ${event.correlation_id}`, event.unreadable,
  ];
  $("event-facts").textContent = facts.filter(Boolean).join(" · ");
  const colour = { delivered: "good", dead: "bad", pending: "warn", leased: "warn" };
  fill("event-why", whys.map((why) => row(
    element("b", {}, why.subscription), element("span", { class: colour[why.state] || "quiet" }, why.state === "none" ? "–" : why.state),
    why.reason,
    element("td", { class: "tight" }, ["pending", "leased"].includes(why.state) || why.details.cause === "filter" ? "" :
      element("button", { onclick: safely(() => again(event, why)) }, why.state === "none" ? "Deliver" : "Deliver again")),
  )), 4, "No subscriptions.");
  const attempts = event.deliveries.flatMap((delivery) => delivery.attempt_log.map((attempt) => row(
    delivery.subscription, number(attempt.attempt ?? "–"), element("td", { class: "tight" }, time(attempt.at)),
    attempt.worker || "–", number(attempt.milliseconds ?? "–"), error(attempt.error),
  )));
  fill("event-attempts", attempts, 6, "None.");
  $("event-payload").textContent = JSON.stringify(event.payload, null, 2) ?? "";
  if (!$("event").open) $("event").showModal();
}

async function again(event, why) {
  const text = "The destination gets the event with the same id. A transactional handler remembers it, so its effect does not happen a second time.";
  const reason = await confirmed(`Deliver this event to ${why.subscription} again?`, text, "Deliver");
  if (reason === null) return;
  const { changed } = await call(`/subscriptions/${encodeURIComponent(why.subscription)}/replay`, { event_ids: [event.id], reason });
  toast(changed ? `${why.subscription} gets the event again` : "nothing to do: it is not finished yet");
  await Promise.all([show(event.id), refresh(), changes()]);
}

// Changes

async function changes() {
  const { items } = await call("/audit");
  fill("change-rows", items.map((item) => {
    const { changed, reason, ...which } = item.details || {};
    const rest = Object.entries(which).filter(([, value]) => value != null && String(value) !== "");
    const details = rest.map(([name, value]) => `${name} ${Array.isArray(value) ? value.join(", ") : value}`).join("; ");
    const count = changed == null || ["pause", "resume"].includes(item.action) ? "" : ` ${thousands(changed)}`;
    return row(element("td", { class: "tight" }, time(item.at)), item.actor,
      `${item.action}${count} · ${item.target}${details ? ` (${details})` : ""}`, reason || "–");
  }), 4, "None yet.");
}

$("dead-filter").addEventListener("submit", (submitted) => { submitted.preventDefault(); safely(deadLetters)(false); });
$("event-filter").addEventListener("submit", (submitted) => { submitted.preventDefault(); safely(events)(false); });
$("dead-more").addEventListener("click", () => safely(deadLetters)(true));
$("event-more").addEventListener("click", () => safely(events)(true));
$("dead-all").addEventListener("change", (changed) => {
  for (const box of $("dead-rows").querySelectorAll("input")) box.checked = changed.target.checked;
  chosen();
});
for (const button of document.querySelectorAll("button[data-action]")) {
  button.addEventListener("click", () => safely(act)(button.dataset.action, button.dataset.which));
}
refresh();
safely(deadLetters)(false);
safely(events)(false);
safely(changes)();
setInterval(() => { if (!document.hidden) refresh(); }, 3000);
