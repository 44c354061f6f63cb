/** The page: what is chosen lies in the address, what is shown is asked for anew whenever a candle may have closed. */

import { ask, key, listen, pause, Problem } from "./api.js";
import { Chart } from "./chart.js";
import { chosen, entryOf, fill, take } from "./choices.js";
import { figures, freshness, hindsight, known, problem, record, steps, verdict } from "./panels.js";
import { degraded, make, percent, priceFormat, time } from "./text.js";

const CANDLES = 400; // more than a wide screen shows
const LONGEST_STEPS = 512; // of one forecast
const OFTENEST_MS = 5_000; // between two questions for the same forecast
const SELDOMEST_MS = 60_000;
const THUMB = 8; // px from the end of a slider to the middle of its thumb
const HEALTH_MS = 15_000;
const SCORES_MS = 20_000;

const at = (id) => document.getElementById(id);
const page = { known: { series: [], models: [], watched: [] }, view: null, stop: new AbortController() };
const chart = new Chart(at("chart"), read, alignSlider);

/** Ask what there is, fill the choices, show what the address says. */
async function boot() {
  await reported(async () => {
    const signal = renewed();
    const [symbols, models, watch] = await Promise.all(
      ["symbols", "models", "watch"].map((path) => ask(path, { signal }).catch(elsewhere(path))),
    );
    page.known = { series: symbols.symbols, models: models.models, watched: watch.entries };
    await show();
  });
}

/** A process that keeps score alone has no watch list; everything else is a problem. */
const elsewhere = (path) => (error) => {
  if (path === "watch" && error.status === 404) return { entries: [] };
  throw error;
};

/** Show what the address says, from nothing; what was shown before stops being followed. */
async function show() {
  const signal = renewed();
  const wanted = chosen(page.known);
  fill(wanted, page.known);
  document.title = `${wanted.symbol ?? "No candles"} · Candlecast`;
  page.view = { chosen: wanted, answer: null, candles: [], past: null, live: false, ahead: 0 };
  blank(wanted);
  if (!wanted.symbol) return;
  await reported(async () => {
    page.view.candles = await candles(signal);
    draw();
    await Promise.all([follow(signal), watchLateness(signal), watchScores(signal)]);
  });
}

/** Keep the forecast fresh: by the stream where the watch list has it, else by asking when it is no longer valid. */
async function follow(signal) {
  const { view } = page;
  const listed = entryOf(view.chosen, page.known);
  for (let failures = 0, lastId; ; ) {
    try {
      if (!listed || !view.answer) await refreshed(await ask(...forecastRequest(listed, signal)), signal);
      for await (const event of listed ? stream(lastId, signal) : []) {
        [view.live, lastId, failures] = [true, event.id, 0];
        await refreshed(JSON.parse(event.data), signal);
      }
      failures = 0;
    } catch (error) {
      if (signal.aborted) throw error;
      failures += 1;
      complain(error);
      if (error.status >= 400 && error.status < 500 && error.status !== 429) return; // asked again it is the same
    }
    view.live = false;
    await pause(listed || failures ? Math.min(1000 * 2 ** failures, SELDOMEST_MS) : untilDue(), signal);
    await visible(signal);
  }
}

/** A stream says nothing while the next forecast is late or fails: read then what is known of the newest. */
async function watchLateness(signal) {
  for (;;) {
    await pause(OFTENEST_MS, signal);
    const { answer, live, ahead, chosen } = page.view;
    const isPast = live && Date.now() + ahead > answer.valid_until + OFTENEST_MS;
    if (!isPast && !(live && answer.meta.degraded.includes("stale"))) continue;
    const query = { model: chosen.model, interval: chosen.interval };
    const newest = await ask(`${forecastPath()}/latest`, { query, signal }).catch(() => null); // the stream says why
    if (newest) await refreshed(newest, signal);
  }
}

const stream = (lastId, signal) => {
  const { interval, model } = page.view.chosen;
  return listen(`${forecastPath()}/stream`, { query: { model, interval }, lastId, signal });
};

function forecastRequest(listed, signal) {
  const { interval, model, horizon = listed?.horizon } = page.view.chosen;
  return [forecastPath(), { body: { model, interval, horizon }, signal }];
}

const forecastPath = () => `forecast/${encodeURIComponent(page.view.chosen.symbol)}`;

/** Take a new forecast, and with it the candles and scores that came since. */
async function refreshed(answer, signal) {
  const { view } = page;
  const isKnown = view.answer?.as_of === answer.as_of;
  const isNews = view.answer && !isKnown;
  Object.assign(view, { answer, ahead: answer.issued_at - Date.now() });
  quiet();
  if (isNews || view.candles.at(-1)?.[4] !== answer.last_close) view.candles = await candles(signal);
  draw();
  tell(answer);
  if (isNews) announce(answer);
  if (!isKnown) await Promise.all([scores(signal), lookBack(signal)]);
}

async function candles(signal) {
  const { symbol, interval } = page.view.chosen;
  const query = { interval, limit: CANDLES };
  return (await ask(`candles/${encodeURIComponent(symbol)}`, { query, signal })).candles;
}

/** Scores follow a candle when they can, and other symbols' follow theirs. */
async function watchScores(signal) {
  for (;;) {
    await pause(SCORES_MS, signal);
    await visible(signal);
    await scores(signal).catch((error) => {
      signal.throwIfAborted();
      at("record").textContent = error.message;
    });
  }
}

async function scores(signal) {
  const { symbol, interval } = page.view.chosen;
  const [own, all] = await Promise.all([
    ask(`accuracy/${encodeURIComponent(symbol)}`, { query: { interval }, signal }),
    ask("accuracy", { signal }),
  ]);
  const standings = own.series.flatMap((each) => each.standings);
  const shared = all.models.filter((each) => each.interval === interval && each.symbols > 1);
  const none = "Nothing scored yet: that takes a forecast served before its candles close, and then those candles.";
  at("record").replaceChildren(...record(`${symbol} · ${interval}`, standings, none));
  at("records").replaceChildren(...(shared.length ? record(`All symbols · ${interval}`, shared) : []));
}

/** The forecast as it was served some candles ago, over what happened since. */
async function lookBack(signal) {
  const { view } = page;
  const slider = at("lookback");
  if (slider.disabled) slider.value = Math.ceil(view.answer.horizon / 2);
  slider.disabled = false;
  const back = Number(slider.value);
  at("lookback-value").textContent = back || "none";
  if (!back || !view.answer) return showPast(null, "The slider lays an earlier forecast over what happened.");
  const origin = view.candles.at(-1 - back)[0];
  const until = back < 2 ? null : view.candles.at(1 - back)[0] - 1; // just before the next candle closed
  const { symbol, interval, name, version } = { ...view.chosen, ...view.answer.model };
  const query = { interval, model: `${name}@${version}`, as_of: until, limit: LONGEST_STEPS };
  const { rows } = await ask(`forecasts/${encodeURIComponent(symbol)}`, { query, signal });
  const served = rows.filter((row) => row[0] <= origin).at(-1);
  if (!served) return showPast(null, `None by ${name} is kept from then. A week after their candles all are forgotten.`);
  const own = rows.filter((row) => row[0] === served[0] && row[1] === served[1]);
  const last = view.candles.find((candle) => candle[0] === served[0])?.[4] ?? own[0][6];
  const parts = own.map(([, , opens, , , low, median, high]) => ({ time: opens, low, median, high }));
  const past = { origin: served[0], issuedAt: served[1], last, steps: parts };
  showPast(past, hindsight(past, new Map(view.candles.map((candle) => [candle[0], candle[4]]))));
}

/** The thumb stands below the candle that it means. */
function alignSlider({ visible, ends: [left, right] }) {
  const slider = at("lookback");
  slider.max = visible - 1;
  Object.assign(slider.style, { marginLeft: `${left - THUMB}px`, width: `${right - left + 2 * THUMB}px` });
}

function showPast(past, words) {
  page.view.past = past;
  at("lookback-text").textContent = words;
  draw();
}

function draw() {
  const { answer, candles, past, chosen } = page.view;
  const write = priceFormat(answer?.last_close ?? candles.at(-1)?.[4]);
  chart.show({ candles, interval: chosen.interval, write, forecast: answer && asFan(answer), past });
}

function asFan(answer) {
  const { "0.1": low, "0.9": high } = answer.quantiles.close;
  const parts = answer.forecast.map(([opens, , , , close], step) => ({
    ...{ time: opens, low: low[step], median: close, high: high[step] },
    ...{ step: step + 1, rise: answer.returns.prob_up[step] },
  }));
  return { origin: page.view.candles.at(-1)?.[0], last: answer.last_close, steps: parts };
}

/** Everything in words that the answer says. */
function tell(answer) {
  const { name, version, runtime, dtype } = answer.model;
  busy(false);
  at("figures").replaceChildren(...figures(answer));
  at("verdict").replaceChildren(verdict(answer));
  at("steps").replaceChildren(steps(answer));
  at("held-out").textContent = known(answer);
  at("horizon").placeholder = answer.horizon;
  const { cache, context, timings_ms: took } = answer.meta;
  const how = cache === "hit" ? "kept since it was computed" : `computed in ${Math.ceil(took.total)} ms`;
  at("provenance").textContent = `${name} @ ${version}, ${runtime} in ${dtype}, from ${context} candles, ${how}.`;
  at("chart").setAttribute("aria-label", `${summary(answer)} Arrow keys read single candles.`);
  age();
}

function summary({ symbol, horizon, forecast, last_close: last, quantiles: { close } }) {
  const write = priceFormat(last);
  const band = `80 % band ${write(close["0.1"].at(-1))} to ${write(close["0.9"].at(-1))}`;
  return `${symbol}: last close ${write(last)}; in ${horizon} candles median ${write(forecast.at(-1)[4])}, ${band}.`;
}

const announce = (answer) => (at("announcement").textContent = `New forecast. ${summary(answer)}`);

function age() {
  const { answer, ahead, live } = page.view ?? {};
  if (answer) at("freshness").textContent = freshness(answer, Date.now() + ahead, live);
}

/** What the cursor stands on; by default the newest candle. */
function read(found, byKey) {
  const { candles = [], chosen, answer } = page.view ?? {};
  const { candle, step, past } = found ?? { candle: candles.at(-1) };
  const write = priceFormat(answer?.last_close ?? candles.at(-1)?.[4]);
  const band = (of) => `${write(of.median)}, 80 % band ${write(of.low)} – ${write(of.high)}`;
  const parts = [
    ...(candle || step ? [time(candle?.[0] ?? step.time, chosen.interval)] : []),
    ...(candle ? ["O", "H", "L", "C"].map((name, place) => `${name} ${write(candle[place + 1])}`) : []),
    ...(step ? [`step ${step.step}`, `median ${band(step)}`, `rise ${percent(step.rise, { decimals: 0 })}`] : []),
    ...(past ? [`forecast then ${band(past)}`] : []),
  ];
  at("readout").setAttribute("aria-live", byKey ? "polite" : "off");
  at("readout").replaceChildren(...parts.map((part) => make("span", {}, part)));
}

async function watchHealth() {
  const { signal } = new AbortController();
  for (;;) {
    const [state, words] = await ask("readyz").then(
      ({ degraded: of }) => (of.length ? ["degraded", of.map(degraded).join("; ")] : ["ready", "Service ready"]),
      (error) => ["down", error.status ? "Service not ready" : "Service not reachable"],
    );
    const health = at("health");
    const isBack = health.className === "down" && state !== "down";
    if (health.textContent !== words) Object.assign(health, { textContent: words, className: state });
    if (isBack && !page.known.series.length) boot();
    await pause(HEALTH_MS, signal);
    await visible(signal);
  }
}

/** Until the forecast is no longer valid; where its candle is late, ask again now and then. */
function untilDue() {
  const { answer, ahead } = page.view;
  const due = answer.valid_until - Date.now() - ahead + 1000;
  return Math.min(SELDOMEST_MS, Math.max(OFTENEST_MS, due));
}

async function visible(signal) {
  while (document.hidden) await pause(1000, signal);
}

/** Run, and say what went wrong unless it was given up for something else. */
async function reported(work) {
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
}

function complain(error) {
  if (!(error instanceof Problem)) throw error;
  if (error.status === 401) openAccess(true);
  at("problem").replaceChildren(...problem(error, page.known.series.length ? show : boot));
  at("problem").hidden = false;
  busy(false);
}

/** Whether something is on its way; where nothing is and there are no candles, there is no chart either. */
function busy(is) {
  const { candles = [], chosen } = page.view ?? {};
  const bare = !is && !candles.length;
  at("forecast").setAttribute("aria-busy", String(is));
  at("forecast").classList.toggle("bare", bare);
  at("forecast").hidden = bare && (!chosen || Boolean(chosen.symbol)); // the problem says it all
  if (!bare) return;
  at("title").textContent = "No candles are stored yet";
  at("freshness").textContent = "Store some with candlecast ingest FILE, or PUT /candles/{symbol}.";
}

function quiet() {
  at("problem").hidden = true;
}

function renewed() {
  page.stop.abort(new DOMException("something else is shown", "AbortError"));
  page.stop = new AbortController();
  return page.stop.signal;
}

/** Take away what belongs to another choice. */
function blank({ symbol, interval }) {
  for (const id of ["figures", "verdict", "steps", "record", "records"]) at(id).replaceChildren();
  for (const id of ["freshness", "held-out", "provenance", "lookback-text", "lookback-value"]) at(id).textContent = "";
  at("lookback").disabled = true;
  at("title").replaceChildren(symbol ?? "", make("small", {}, interval ?? ""));
  busy(Boolean(symbol));
  quiet();
  draw();
  read(null, false);
}

function openAccess(open) {
  at("access").hidden = !open;
  at("access-toggle").setAttribute("aria-expanded", String(open));
}

at("choices").addEventListener("change", (event) => take(event) && show());
at("choices").addEventListener("submit", (event) => event.preventDefault());
at("lookback").addEventListener("input", () => reported(() => lookBack(page.stop.signal)));
at("access-toggle").addEventListener("click", () => {
  openAccess(at("access").hidden);
  if (!at("access").hidden) at("key").focus();
});
at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(at("key").value.trim());
  at("key").value = "";
  openAccess(false);
  boot();
});
addEventListener("popstate", show);
setInterval(age, 1000);
watchHealth();
boot();
