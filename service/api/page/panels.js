/** What stands around the chart: figures, the verdict, tables of steps and scores, problems. */

import { count, DAY, degraded, DRIFT, make, percent, priceFormat, reason, span, time } from "./text.js";

/** Last close, where the forecast ends, its band and the chance of a rise. */
export function figures(answer) {
  const write = priceFormat(answer.last_close);
  const [low, high] = ["0.1", "0.9"].map((level) => answer.quantiles.close[level].at(-1));
  const median = answer.forecast.at(-1)[4];
  const change = (price) => percent(price / answer.last_close - 1, { signed: true, decimals: 2 });
  const after = `in ${answer.horizon} candle${answer.horizon === 1 ? "" : "s"}`;
  const band = answer.calibration?.mode === "on" ? "80 % band, recalibrated" : "80 % band";
  return [
    figure("Last close", write(answer.last_close), "the naive forecast of every step"),
    figure(`Median ${after}`, write(median), change(median)),
    figure(band, `${write(low)} – ${write(high)}`, `${change(low)} to ${change(high)}`),
    figure("Chance of a rise", percent(answer.returns.prob_up.at(-1), { decimals: 0 }), after),
  ];
}

const figure = (name, value, note) =>
  make("div", {}, make("dt", {}, name), make("dd", {}, value, make("span", {}, note)));

/** Whether to act on the forecast: `do_predict` with its reasons, in words. */
export function verdict({ do_predict: act, reasons, warnings, meta, model }) {
  const words = act
    ? "Nothing measured speaks against this forecast: not found worse than naive, no drift alarm, candles up to date."
    : "Do not act on this forecast.";
  const naive = model.family === "naive" ? ["This is the naive forecast itself: the last close, for ever."] : [];
  const list = bullets([...reasons.map(reason), ...naive, ...meta.degraded.map(degraded), ...warnings]);
  const sign = make("span", { class: "sign", "aria-hidden": "true" }, act ? "✓" : "!");
  const said = make("div", {}, make("p", {}, words), ...list);
  return make("div", { class: act ? "verdict" : "verdict against" }, sign, said);
}

const bullets = (texts) => (texts.length ? [make("ul", {}, ...texts.map((text) => make("li", {}, text)))] : []);

/** Every step with its median, band and chance of a rise. */
export function steps(answer) {
  const write = priceFormat(answer.last_close);
  const { "0.1": low, "0.9": high } = answer.quantiles.close;
  const rows = answer.forecast.map(([opens, , , , close], step) => [
    ...[String(step + 1), time(opens, answer.interval)],
    ...[low[step], close, high[step]].map(write),
    percent(answer.returns.prob_up[step], { decimals: 0 }),
  ]);
  return table("Close of each candle to come", ["Step", "Opens", "10 %", "Median", "90 %", "Rise"], [["", rows]]);
}

/** Scores by version and steps ahead; `nothing` is said where nothing was scored. */
export function record(caption, standings, nothing) {
  if (!standings.length) return [make("h3", {}, caption), make("p", { class: "nothing" }, nothing)];
  const byVersion = grouped(standings, ({ model, version }) => `${model} @ ${version}`);
  const head = ["Steps ahead", "Skill vs naive", "80 % band held", "Scored", "Drift"];
  return [table(caption, head, [...byVersion].map(([name, each]) => [name, each.map(scores)]))];
}

function grouped(items, of) {
  const groups = new Map();
  for (const item of items) groups.set(of(item), [...(groups.get(of(item)) ?? []), item]);
  return groups;
}

function scores({ steps, recent, drift }) {
  const [sign, word] = DRIFT[drift.state];
  const known = recent.steps > 0;
  return [
    steps.replace("-", "–"),
    known && recent.skill_vs_naive !== null ? skill(recent.skill_vs_naive, recent.skill_interval) : "–",
    known ? percent(recent.coverage_80, { decimals: 0 }) : "–",
    count(recent.steps),
    make("span", { class: `drift ${drift.state}` }, make("span", { "aria-hidden": "true" }, sign), ` ${word}`),
  ];
}

function skill(value, interval) {
  const part = (of) => percent(of, { signed: true });
  const range = interval ? interval.map(part).join(" to ") : "too few for an interval";
  return make("span", {}, part(value), make("small", {}, range));
}

/** What is known of the model's worth, as one sentence; nothing where nothing is. */
export function known({ skill: found, model }) {
  if (!found) return `Nothing is known yet of what ${model.name} is worth.`;
  const held = found.source === "evaluation";
  const part = (of) => percent(1 - of, { signed: true });
  const interval = found.low === null ? "" : ` (95 %: ${part(found.high)} to ${part(found.low)})`;
  const closes = found.coverage_80 === null ? "" : percent(found.coverage_80, { decimals: 0 });
  return [
    held ? `On held-out candles, ${days(found.window)}, ` : `Served here, ${found.window}, `,
    `${model.name} had a skill of ${part(found.relative_mae)}${interval}`,
    closes && `, its 80 % band held ${closes} of the closes`,
    `; ${count(found.n)} ${held ? "origins" : "steps"}.`,
  ].join("");
}

const days = (window) => window.split("/").map((end) => time(Date.parse(end), "1d")).join(" to ");

/** What a past forecast was worth on the candles that have come since; `closes` are by opening time. */
export function hindsight({ steps, last, issuedAt }, closes) {
  const closed = steps.map((step) => ({ ...step, close: closes.get(step.time) })).filter((step) => step.close);
  const served = `Served ${time(issuedAt, "1m")} with ${steps.length} steps`;
  if (!closed.length) return `${served}; none of their candles has closed yet.`;
  const sum = (of) => closed.reduce((total, step) => total + of(step), 0);
  const mean = (of) => percent(sum(of) / closed.length / last, { decimals: 2 });
  const error = (guess) => mean((step) => Math.abs(step.close - guess(step)));
  const inside = sum((step) => step.low <= step.close && step.close <= step.high);
  const errors = `mean error ${error((step) => step.median)} of the price, naive ${error(() => last)}`;
  return `${served}; ${closed.length} closed, ${inside} of them inside the 80 % band; ${errors}.`;
}

/** What went wrong and what to do; `retry` is called by a button, where another try may help. */
export function problem({ status, message, faults, nextSteps }, retry) {
  const sentence = `${message[0].toUpperCase()}${message.slice(1).replace(/\.$/, "")}.`;
  const button = make("button", { type: "button" }, "Try again");
  button.addEventListener("click", retry);
  const code = status ? [make("small", {}, `Status ${status}`)] : [];
  return [make("div", {}, make("strong", {}, sentence), ...bullets([...faults, ...nextSteps]), ...code), button];
}

/** How old what is known is, and when more will be. */
export function freshness({ as_of: asOf, valid_until: validUntil }, now, live) {
  const age = `Candles to ${time(asOf, "1m", { year: now - asOf > 300 * DAY })}, ${span(Math.max(0, now - asOf))} old`;
  const next = validUntil > now ? `forecast valid for ${span(validUntil - now)}` : "next candle due";
  return `${age} · ${next} · ${live ? "updates live" : "asked again when due"}`;
}

function table(caption, head, groups) {
  const headings = head.map((name) => make("th", { scope: "col" }, name));
  const bodies = groups.map(([name, rows]) => {
    const title = name ? [make("tr", {}, make("th", { scope: "rowgroup", colspan: head.length }, name))] : [];
    const lines = rows.map(([first, ...cells]) =>
      make("tr", {}, make("th", { scope: "row" }, first), ...cells.map((cell) => make("td", {}, cell))),
    );
    return make("tbody", {}, ...title, ...lines);
  });
  return make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...headings)), ...bodies);
}
