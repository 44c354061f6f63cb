/** Candles, the fan of a forecast and a past one over what happened, drawn as SVG that the style sheet colours.
 *
 * Time runs in slots, one a candle, so that nights and weekends leave no gaps: visible candles first, then the steps
 * of the forecast. Closes above the open are hollow, others filled: colour tells forecasts apart, never up from down.
 */

import { clock, date, DAY, intervalMs, make, numberFormat } from "./text.js";

const DIGIT = 7.6; // px of a price tag for each of its characters
const BOTTOM = 24;
const TOP = 20;
const SLOT = 6.5; // px that a slot takes where there is room
const FEWEST = 40;
const TALLEST = 3; // times the highest candle: a band that explodes is cut off there
const LABEL = 64; // px between labels of time
const MINUTES = [1, 5, 10, 15, 30, 60, 120, 240, 360, 720, 1440, 2880, 10080];

export class Chart {
  #svg;
  #onCursor;
  #onDraw;
  #data = null;
  #cursor = null;
  #scale = null;
  #mark = make("g", { class: "cursor" });

  /** `onCursor(found, byKey)` is told what the cursor stands on: `{candle, step, past}` as far as there are any;
   * `onDraw(chart)` that what is visible has changed. */
  constructor(svg, onCursor, onDraw) {
    [this.#svg, this.#onCursor, this.#onDraw] = [svg, onCursor, onDraw];
    new ResizeObserver(() => this.#draw()).observe(svg);
    svg.addEventListener("pointermove", (event) => this.#point(event.clientX));
    svg.addEventListener("pointerdown", (event) => this.#point(event.clientX));
    svg.addEventListener("pointerleave", () => this.#move(null, false));
    svg.addEventListener("keydown", (event) => this.#press(event));
    svg.addEventListener("blur", () => this.#move(null, false));
  }

  /** `candles` [[ms, o, h, l, c], …], `interval`, `write` for a price, and as far as there are `forecast` and `past`
   * {origin, last, steps: [{time, low, median, high}, …]}; `last` is the close of the candle that opens at `origin`.
   */
  show(data) {
    this.#data = data;
    this.#draw();
  }

  /** How many candles are visible. */
  get visible() {
    return this.#scale?.candles.length ?? 0;
  }

  /** Where the first and the last of them are, in px from the left. */
  get ends() {
    return [this.#scale.x(0), this.#scale.x(this.visible - 1)];
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#svg;
    if (!this.#data?.candles.length || !width) {
      this.#scale = null;
      return this.#svg.replaceChildren();
    }
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const scale = (this.#scale = scaled(this.#data, width, height));
    const { forecast, past } = scale;
    const tags = priceTags(scale);
    this.#svg.replaceChildren(
      ...background(scale, tags),
      ...(past ? fan(scale, past, "past") : []),
      ...(forecast ? fan(scale, forecast, "forecast") : []),
      ...candleShapes(scale),
      ...tags.flatMap((tag) => tagShapes(scale, tag)),
      this.#mark,
    );
    this.#move(this.#cursor, false);
    this.#onDraw(this);
  }

  #point(clientX) {
    const offset = clientX - this.#svg.getBoundingClientRect().left;
    if (this.#scale) this.#move(Math.floor(offset / this.#scale.slot), false);
  }

  #press(event) {
    const last = this.#scale?.times.length - 1;
    const here = this.#cursor ?? this.visible - 1;
    const next = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last, Escape: null }[event.key];
    if (next === undefined || !this.#scale) return;
    event.preventDefault();
    this.#move(next, true);
  }

  #move(slot, byKey) {
    const scale = this.#scale;
    if (!scale) return;
    this.#cursor = slot === null ? null : Math.min(Math.max(slot, 0), scale.times.length - 1);
    if (this.#cursor === null) {
      this.#mark.replaceChildren();
      return this.#onCursor(null, byKey);
    }
    const here = scale.x(this.#cursor);
    const step = scale.forecast?.bySlot.get(this.#cursor);
    const candle = scale.candles[this.#cursor];
    const at = step ? step.median : candle[4];
    const line = make("line", { x1: here, x2: here, y1: 0, y2: scale.bottom });
    this.#mark.replaceChildren(line, make("circle", { cx: here, cy: scale.y(at), r: 3.5 }));
    this.#onCursor({ candle, step, past: scale.past?.bySlot.get(this.#cursor) }, byKey);
  }
}

/** Where everything lies: slots, their times, and the two scales. */
function scaled({ candles, interval, write, forecast, past }, width, height) {
  const steps = forecast?.steps.length ?? 0;
  const tagged = [candles.at(-1)[4], forecast?.steps.at(-1).median ?? 0];
  const right = 12 + DIGIT * Math.max(...tagged.map((price) => write(price).length));
  const plot = width - right;
  const fitting = Math.max(FEWEST, Math.ceil(steps / 2), Math.floor(plot / SLOT) - steps);
  const visible = candles.slice(-fitting);
  const times = [...visible.map((candle) => candle[0]), ...(forecast?.steps ?? []).map((step) => step.time)];
  const slots = new Map(times.map((time, slot) => [time, slot]));
  const [now, before] = [forecast, past].map((each) => each && placed(each, slots));
  const shown = [now, before].filter(Boolean).flatMap((each) => [...each.bySlot.values()]);
  const lowest = Math.min(...visible.map((candle) => candle[3]), ...shown.map((step) => step.low));
  const top = Math.max(...visible.map((candle) => candle[2]));
  const highest = Math.max(top, ...shown.map((step) => Math.min(step.high, TALLEST * top)));
  const room = (highest - lowest || Math.abs(highest) * 0.01 || 1) * 0.05;
  const slot = plot / times.length;
  const bottom = height - BOTTOM;
  const perUnit = (bottom - TOP) / (highest - lowest + 2 * room);
  return {
    ...{ right, height, plot, bottom, slot, times, interval, write, candles: visible, forecast: now, past: before },
    x: (place) => round((place + 0.5) * slot),
    y: (price) => round(bottom - (price - lowest + room) * perUnit),
    range: [lowest - room, highest + room],
  };
}

/** A forecast with the slots that its origin and steps have; steps out of sight are left out. */
function placed(each, slots) {
  const inSight = each.steps.filter((step) => slots.has(step.time));
  const bySlot = new Map(inSight.map((step) => [slots.get(step.time), step]));
  return { ...each, start: slots.get(each.origin) ?? null, bySlot };
}

function background(scale, tags) {
  const parts = [];
  const edge = round(scale.candles.length * scale.slot);
  if (scale.forecast) {
    parts.push(make("rect", { class: "future", x: edge, y: 0, width: round(scale.plot - edge), height: scale.bottom }));
    parts.push(make("line", { class: "now", x1: edge, x2: edge, y1: 0, y2: scale.bottom }));
    parts.push(make("text", { class: "label", x: edge + 6, y: 12 }, "Forecast"));
  }
  const step = niceStep(scale.range, (scale.bottom - TOP) / 52);
  const write = numberFormat([0, 1, 2, 3, 4, 5, 6, 7].find((decimals) => isWhole(step * 10 ** decimals)) ?? 8);
  for (let price = Math.ceil(scale.range[0] / step) * step; price < scale.range[1]; price += step) {
    const y = scale.y(price);
    parts.push(make("line", { class: "grid", x1: 0, x2: scale.plot, y1: y, y2: y }));
    const hidden = tags.some((tag) => Math.abs(tag.y - y) < 15);
    if (!hidden) parts.push(make("text", { class: "label", x: scale.plot + 8, y: y + 4 }, write(price)));
  }
  for (const { slot, text } of timeLabels(scale)) {
    parts.push(make("text", { class: "label middle", x: scale.x(slot), y: scale.height - 6 }, text));
  }
  return parts;
}

/** Labels where an hour, day or month of a round number begins, as near to each other as they fit. */
function timeLabels({ times, slot, interval, x, plot }) {
  const perPixel = intervalMs(interval) / slot;
  const units = MINUTES.map((minutes) => minutes * 60_000).filter((ms) => ms >= intervalMs(interval));
  const unit = units.find((ms) => ms >= LABEL * perPixel);
  const months = [1, 3, 6, 12].find((number) => number * 30 * DAY >= LABEL * perPixel) ?? 12;
  const monthOf = (time) => new Date(time).getUTCFullYear() * 12 + new Date(time).getUTCMonth();
  const part = (time) => (unit ? Math.floor(time / unit) : Math.floor(monthOf(time) / months));
  const labels = [];
  times.forEach((time, place) => {
    if (!place || part(time) === part(times[place - 1])) return;
    const last = labels.at(-1);
    const before = last?.time ?? times[place - 1];
    const here = x(place);
    if (here < 24 || here > plot - 16 || (last && here - x(last.slot) < LABEL * 0.8)) return;
    labels.push({ slot: place, time, text: timeLabel(time, before, unit) });
  });
  return labels;
}

function timeLabel(time, last, unit) {
  const changes = (parts) => date(time, parts) !== date(last, parts);
  if (!unit) return date(time, { month: "short", ...(changes({ year: "numeric" }) && { year: "numeric" }) });
  const newDay = changes({ day: "numeric", month: "short" });
  return newDay || unit >= DAY ? date(time, { day: "numeric", month: "short" }) : clock(time);
}

/** The band as an area, the median as a line and the naive forecast as another, all from the close at the origin. */
function fan({ x, y, times }, { start, last, bySlot }, name) {
  const slots = [...bySlot.keys()].sort((a, b) => a - b);
  if (!slots.length) return [];
  const from = start === null ? [] : [`${x(start)} ${y(last)}`];
  const along = (level) => slots.map((slot) => `${x(slot)} ${y(bySlot.get(slot)[level])}`);
  const area = [...from, ...along("high"), ...along("low").reverse()];
  const end = x(Math.min(slots.at(-1), times.length - 1));
  return [
    make("path", { class: `${name} band`, d: `M${area.join("L")}Z` }),
    make("path", { class: `${name} median`, d: `M${[...from, ...along("median")].join("L")}` }),
    make("path", { class: `${name} naive`, d: `M${x(start ?? slots[0])} ${y(last)}H${end}` }),
  ];
}

function candleShapes({ candles, x, y, slot }) {
  const half = Math.max(0.5, Math.min(5, slot * 0.32));
  const shapes = { wicks: "", up: "", down: "" };
  candles.forEach(([, open, high, low, close], place) => {
    const here = x(place);
    const [top, bottom] = [y(Math.max(open, close)), y(Math.min(open, close))];
    const body = `M${round(here - half)} ${top}h${round(2 * half)}V${Math.max(bottom, top + 1)}h${round(-2 * half)}Z`;
    shapes.wicks += `M${here} ${y(high)}V${top}M${here} ${bottom}V${y(low)}`;
    shapes[close >= open ? "up" : "down"] += body;
  });
  return Object.entries(shapes).map(([name, d]) => make("path", { class: `candles ${name}`, d }));
}

/** The prices at the right edge: where the forecast ends and, beside it, the last close. */
function priceTags({ candles, forecast, y, bottom }) {
  const close = candles.at(-1)?.[4];
  const median = forecast?.steps.at(-1).median;
  const tags = median === undefined ? [] : [{ name: "forecast", price: median, y: y(median) }];
  if (close === undefined) return tags;
  let at = y(close);
  if (tags.length && Math.abs(at - tags[0].y) < 19) at = tags[0].y + (at >= tags[0].y ? 19 : -19);
  return [...tags, { name: "last", price: close, y: Math.min(at, bottom - 10) }];
}

function tagShapes({ plot, right, write }, { name, price, y }) {
  return [
    make("rect", { class: `tag ${name}`, x: plot + 3, y: y - 9, width: round(right - 4), height: 18, rx: 3 }),
    make("text", { class: `tag ${name}`, x: plot + 8, y: y + 4 }, write(price)),
  ];
}

function niceStep([low, high], parts) {
  const raw = (high - low) / Math.max(2, parts);
  const power = 10 ** Math.floor(Math.log10(raw));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw);
}

const isWhole = (value) => Math.abs(value - Math.round(value)) < 1e-6;
const round = (value) => Math.round(value * 10) / 10;
