@group(0) @binding(0) var<storage, read> X: array<u32>;
@group(0) @binding(1) var<storage, read_write> Y: array<atomic<u32>>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {
  let i_b = i32(wg.x);
  let t1 = (i_b * 64i);
  let t2 = (i_b * 16i);
  let i_t = i32(lid.x);
  if (((i_t + t1) < 37i)) {
    atomicAnd(&Y[(t2 + (i_t / 4i))], ~(255u << u32(u32(((i_t % 4i) * 8i))))); atomicOr(&Y[(t2 + (i_t / 4i))], ((u32((extractBits(i32(((X[(t2 + (i_t / 4i))] >> u32(u32(((i_t % 4i) * 8i)))) & 255u)), 0u, 8u) < 3i)) & 255u) << u32(u32(((i_t % 4i) * 8i)))));
  }
}
