// Choosing the next token, as sampling.py does, from the raw logits: a repetition penalty, then temperature,
// top_k, top_p, min_p. The random numbers are not numpy's: a seed gives the same text here, not Python's.

export function sampler({ temperature = 0, topK, topP, minP, repetitionPenalty, seed } = {}) {
  const random = generator(seed ?? Math.floor(Math.random() * 2 ** 32));
  return (logits, ids) => {
    const scores = repetitionPenalty && repetitionPenalty !== 1 ? penalized(logits, ids, repetitionPenalty) : logits;
    if (temperature === 0) return argmax(scores);
    const kept = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b);
    return draw(keep(kept, scores, Math.max(temperature, 1e-30), topK, topP, minP), random());
  };
}

export function argmax(scores) {
  let best = 0;
  for (let index = 1; index < scores.length; index++) if (scores[index] > scores[best]) best = index;
  return best;
}

function penalized(logits, ids, penalty) {
  const scores = Float32Array.from(logits);
  for (const id of new Set(ids)) scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
  return scores;
}

// [[token, weight], ...], the likeliest first.
function keep(order, scores, temperature, topK, topP, minP) {
  const highest = scores[order[0]];
  let kept = order.map((token) => [token, Math.exp((scores[token] - highest) / temperature)]);
  if (topK && topK < kept.length) {
    const last = kept[topK - 1][1]; // all that equal it stay, as in TopKLogitsWarper
    kept = kept.filter(([, weight], index) => index < topK || weight === last);
  }
  if (topP && topP < 1) {
    const total = sum(kept);
    let before = 0;
    kept = kept.filter(([, weight], index) => {
      const stays = index === 0 || before < topP * total;
      before += weight;
      return stays;
    });
  }
  return minP ? kept.filter(([, weight]) => weight >= kept[0][1] * minP) : kept;
}

function draw(kept, uniform) {
  let left = uniform * sum(kept);
  for (const [token, weight] of kept) if ((left -= weight) < 0) return token;
  return kept[0][0];
}

const sum = (kept) => kept.reduce((total, [, weight]) => total + weight, 0);

// mulberry32: numbers in [0, 1) of a seed of 32 bits.
function generator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}
