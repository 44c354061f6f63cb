/** Numbers with their units, times, and the service's codes in words. */

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
export const DAY = 24 * HOUR;
const UNITS = { m: MINUTE, h: HOUR, d: DAY, w: 7 * DAY };
const SPANS = [[365.25 * DAY, "years"], [DAY, "days"], [HOUR, "h"], [MINUTE, "min"], [1000, "s"]];

const REASONS = {
  worse_than_naive: "Its errors are larger than those of “the price stays where it is”, and not by chance.",
  drift_alarm: "Its errors have risen well above those it was published with.",
  stale_history: "The stored candles end in the past: at least one more should have arrived since.",
  no_baseline: "Nothing is known of its skill: it came without scores, and too few of its forecasts were scored here.",
};
const DEGRADED = {
  ledger: "the ledger cannot be written now, forecasts are noted later",
  runtime: "the model’s faster runtime is not ready yet",
  stale: "newer candles have come, their forecast has not",
};
/** A sign for each state of drift, so that colour is not what tells it. */
export const DRIFT = {
  ok: ["●", "steady"],
  warn: ["▲", "errors rising"],
  alarm: ["■", "alarm"],
  insufficient: ["○", "too early to say"],
  no_baseline: ["–", "no baseline"],
};

export const reason = (code) => REASONS[code] ?? code.replaceAll("_", " ");
export const degraded = (code) => DEGRADED[code] ?? code.replaceAll("_", " ");

/** The length of an interval such as 15m, in ms; a month and the like count as nothing known. */
export const intervalMs = (name) => parseInt(name, 10) * (UNITS[name.at(-1)] ?? DAY);

/** Writes prices with as many decimals as one of about this size needs. */
export function priceFormat(size) {
  return numberFormat(size >= 10 ? 2 : Math.min(8, 4 - Math.floor(Math.log10(size || 1))));
}

export function numberFormat(decimals) {
  const format = new Intl.NumberFormat("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return (value) => format.format(value).replace("-", "−");
}

/** 0.0213 as 2.1 %, with a sign if `signed`; never −0.0 %. */
export function percent(part, { signed = false, decimals = 1 } = {}) {
  const rounded = Number((100 * part).toFixed(decimals)) || 0;
  const sign = rounded < 0 ? "−" : signed && rounded > 0 ? "+" : "";
  return `${sign}${numberFormat(decimals)(Math.abs(rounded))} %`;
}

export const count = (number) => numberFormat(0)(number);

/** 90,000 ms as “2 min”. */
export function span(ms) {
  const [unit, name] = SPANS.find(([unit]) => ms >= unit) ?? SPANS.at(-1);
  const value = ms / unit;
  return `${name === "years" ? value.toFixed(1) : Math.round(value)} ${name}`;
}

/** The opening of a candle: its day where the interval is of days, else with the time. */
export function time(ms, interval, { year = intervalMs(interval) >= DAY } = {}) {
  const day = date(ms, { day: "numeric", month: "short", ...(year && { year: "numeric" }) });
  return intervalMs(interval) >= DAY ? day : `${day} ${clock(ms)}`;
}

export const clock = (ms) => new Date(ms).toISOString().slice(11, 16);

export function date(ms, parts) {
  return new Intl.DateTimeFormat("en-GB", { ...parts, timeZone: "UTC" }).format(ms);
}

/** An element with attributes, and children that are elements or text; a list of classes is one attribute. */
export function make(tag, attributes = {}, ...children) {
  const svg = "svg path line rect text g circle".split(" ").includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
