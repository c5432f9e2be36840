// The report's data, and which answers pass the filters.

const data = JSON.parse(byId("report-data").textContent);
const texts = { prompts: [], responses: [] }; // filled by loadTexts, after the first picture
const points = data.points;
const NUM_POINTS = points.model.length;
const NUM_PROMPTS = data.prompt_categories.length;
const NUM_MODELS = data.models.length;

// The point that answers prompt p with model m is answerAt[p * NUM_MODELS + m], -1 where there is none.
const answerAt = new Int32Array(NUM_PROMPTS * NUM_MODELS).fill(-1);
for (let i = 0; i < NUM_POINTS; i++) {
  if (points.prompt[i] >= 0) answerAt[points.prompt[i] * NUM_MODELS + points.model[i]] = i;
}

const view = { promptsShown: false, unsafeUnfolded: false, dark: false };

const filters = {
  models: new Set(data.models.keys()),
  quadrants: new Set(["SH", "SU", "UH", "UU", null]),
  category: -1,
  where: "both",
  needle: "",
  fewest: 0,
  most: Infinity,
};

function loadTexts() {
  Object.assign(texts, JSON.parse(byId("report-texts").textContent));
}

const lowered = { prompts: [], responses: [] };

function contains(kind, index, needle) {
  const text = texts[kind][index];
  if (text === null || text === undefined) return false;
  lowered[kind][index] ??= text.toLowerCase();
  return lowered[kind][index].includes(needle);
}

function passes(i) {
  const f = filters;
  const prompt = points.prompt[i];
  if (!f.models.has(points.model[i]) || !f.quadrants.has(points.quadrant[i])) return false;
  if (f.category >= 0 && !(prompt >= 0 && data.prompt_categories[prompt].includes(f.category))) return false;
  const words = points.words[i];
  if ((f.fewest > 0 || f.most < Infinity) && !(words !== null && words >= f.fewest && words <= f.most)) return false;
  if (f.needle) {
    const inPrompt = f.where !== "response" && contains("prompts", prompt, f.needle);
    if (!inPrompt && !(f.where !== "prompt" && contains("responses", i, f.needle))) return false;
  }
  return true;
}

function passing() {
  const chosen = [];
  for (let i = 0; i < NUM_POINTS; i++) if (passes(i)) chosen.push(i);
  return chosen;
}

function isUnsafe(i) {
  return points.quadrant[i] === null || points.quadrant[i][0] === "U";
}

function modelColour(m) {
  return view.dark ? data.models[m].colour_dark : data.models[m].colour;
}

function colourOf(name) {
  const known = data.colours[name];
  return known ? known[view.dark ? 1 : 0] : "#888888";
}
