// A picture as the model takes it: pixel values of RGBA bytes that have its size already.

// {data: RGBA bytes, width, height} -> Float32Array [3, H, W]. Throws an Error of one sentence.
export function pixels({ data, width, height }, { model: { vision }, calling: { images: steps } }) {
  if (!vision || !steps) throw new Error("The bundle does not say how its model is given pictures; leave them out.");
  if (width !== vision.width || height !== vision.height) {
    throw new Error(`The picture has ${width} x ${height} pixels and the model takes ${vision.width} x ${vision.height}; resize it first.`);
  }
  const area = width * height, values = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    const known = table(steps, channel);
    for (let pixel = 0; pixel < area; pixel++) {
      values[channel * area + pixel] = known[overWhite(data[4 * pixel + channel], data[4 * pixel + 3])];
    }
  }
  return values;
}

// The part of a picture that a processor resizes to the model's size: {x, y, width, height}. It resizes the shortest
// edge to `size` and cuts the middle out, or resizes the whole.
export function frame(width, height, { size, crop }) {
  if (!crop) return { x: 0, y: 0, width, height };
  const edges = Array.isArray(size) ? [width / size[1], height / size[0]] : Array(2).fill(size ? Math.min(width, height) / size : 1);
  const [across, down] = [Math.min(width, crop[1] * edges[0]), Math.min(height, crop[0] * edges[1])];
  return { x: (width - across) / 2, y: (height - down) / 2, width: across, height: down };
}

// What each of the 256 values of a channel becomes, in fp32 as transformers has it; the product is of doubles.
function table({ scale, mean, std }, channel) {
  return Float32Array.from({ length: 256 }, (_, value) => {
    const scaled = Math.fround(scale === null ? value : value * scale);
    return mean && std ? Math.fround(scaled - Math.fround(mean[channel])) / Math.fround(std[channel]) : scaled;
  });
}

// A channel over white, in Pillow's arithmetic of 7 more bits (AlphaComposite.c).
function overWhite(value, alpha) {
  const sum = value * alpha * 128 + 255 * (255 - alpha) * 128 + (0x80 << 7);
  return (((sum >> 8) + sum) >> 8) >> 7;
}
