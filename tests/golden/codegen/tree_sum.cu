extern "C" __global__ void __launch_bounds__(64) kernel_tree_sum(const float* __restrict__ A, float* __restrict__ Y, long long rows) {
  const long long b = (long long)blockIdx.x;
  __shared__ float s[64];
  const long long t1 = (b * 64ll);
  const long long t = (long long)threadIdx.x;
  s[t] = A[(t + t1)];
  __syncthreads();
  if ((t < 32ll)) {
    s[t] = (s[t] + s[(t + 32ll)]);
  }
  __syncthreads();
  if ((t < 16ll)) {
    s[t] = (s[t] + s[(t + 16ll)]);
  }
  __syncthreads();
  if ((t < 8ll)) {
    s[t] = (s[t] + s[(t + 8ll)]);
  }
  __syncthreads();
  if ((t < 4ll)) {
    s[t] = (s[t] + s[(t + 4ll)]);
  }
  __syncthreads();
  if ((t < 2ll)) {
    s[t] = (s[t] + s[(t + 2ll)]);
  }
  __syncthreads();
  if ((t < 1ll)) {
    s[t] = (s[t] + s[(t + 1ll)]);
  }
  __syncthreads();
  if ((t == 0ll)) {
    Y[b] = s[0ll];
  }
}
