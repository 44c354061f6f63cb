/** What is chosen lies in the address, so that a view can be shared; the form shows it and what else there is.
 *
 * `known` is what the service has: `series` as in GET /symbols, `models` as in GET /models, `watched` as in GET /watch.
 */

import { intervalMs, make } from "./text.js";

const FIELDS = ["symbol", "interval", "model", "horizon"];
const MOST_STEPS = 512;

const at = (id) => document.getElementById(id);

/** What the address asks for, completed by the first of the watch list, or of all that is stored. */
export function chosen({ series, watched }) {
  const given = Object.fromEntries(new URLSearchParams(location.search));
  const first = watched.find((entry) => series.some((each) => each.symbol === entry.symbol)) ?? series[0];
  const symbol = (given.symbol ?? first?.symbol)?.replaceAll(/[/:]/g, "-").toUpperCase();
  const entry = watched.find((each) => each.symbol === symbol);
  const interval = given.interval ?? entry?.interval ?? series.find((each) => each.symbol === symbol)?.interval;
  const model = given.model ?? entry?.model ?? "toto";
  return { symbol, interval, model, horizon: Number(given.horizon) || undefined };
}

/** The entry of the watch list whose forecast this is, if any. */
export const entryOf = ({ symbol, interval, model, horizon }, { watched }) =>
  watched.find(
    (entry) =>
      entry.symbol === symbol &&
      entry.model === model &&
      [null, interval].includes(entry.interval) &&
      [undefined, entry.horizon].includes(horizon),
  );

/** Show in the form what is chosen, and what else could be. */
export function fill({ symbol, interval, model, horizon }, { series, models }) {
  const intervals = series.filter((each) => each.symbol === symbol).map((each) => each.interval);
  const pair = (name) => [name, name];
  options("symbol", [...new Set(series.map((each) => each.symbol))].map(pair), symbol);
  options("interval", intervals.sort((a, b) => intervalMs(a) - intervalMs(b)).map(pair), interval);
  options("model", modelNames(models), model);
  const limits = models.find((each) => each.asked_for_as.includes(model))?.limits;
  const most = limits?.max_horizon ?? MOST_STEPS;
  Object.assign(at("horizon"), { value: horizon ?? "", max: most, disabled: !symbol, placeholder: "the model’s own" });
}

/** Put what the form says into the address; false if it says something impossible. Another symbol has its interval. */
export function take({ target }) {
  if (!at("horizon").reportValidity()) return false;
  const said = FIELDS.filter((id) => id !== "interval" || target.id !== "symbol").map((id) => [id, at(id).value]);
  history.pushState(null, "", `?${new URLSearchParams(said.filter(([, value]) => value))}`);
  return true;
}

/** What means each version in production with its name, and what chooses among them. */
function modelNames(models) {
  const serving = models.filter((each) => each.aliases.includes("production"));
  return [...serving.map((each) => [each.asked_for_as[0], each.name]), ["auto", "auto: best by its scores"]];
}

function options(id, pairs, chosen) {
  const all = chosen && !pairs.some(([value]) => value === chosen) ? [[chosen, chosen], ...pairs] : pairs;
  const selected = (value) => (value === chosen ? { selected: "" } : {});
  at(id).replaceChildren(...all.map(([value, text]) => make("option", { value, ...selected(value) }, text)));
  at(id).disabled = !all.length;
}
