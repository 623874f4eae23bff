@group(0) @binding(0) var<storage, read> X: array<u32>;
@group(0) @binding(1) var<storage, read_write> Y: array<atomic<u32>>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {
  let i_b = i32(wg.x);
  let t1 = (i_b * 64i);
  let t2 = (i_b * 16i);
  let i_t = i32(lid.x);
  if (((i_t + t1) < 37i)) {
    let t3 = (t2 + (i_t / 4i));
    let t4 = u32(((i_t % 4i) * 8i));
    let bits_158 = ((u32((extractBits(i32(((X[t3] >> u32(t4)) & 255u)), 0u, 8u) < 3i)) & 255u) << u32(t4)); atomicAnd(&Y[t3], ~(255u << u32(t4))); atomicOr(&Y[t3], bits_158);
  }
}
