// What a device has, or a stand-in for it.  The host sets (pi2_backend_opencl.caps):
//   LANES       neurons of a cluster: 64, one wave of an Adreno in "half" mode
//   SPLITS      work-items that share one neuron's sum
//   SUBGROUPS   1: cl_khr_subgroups; 0: local memory stands in for it
//   BROADCAST   1: activations are loaded by a few lanes and passed to the others
//   REQD_QCOM, REQD_INTEL   how to ask for waves of LANES
//   DOT         0: plain code, 1: cl_khr_integer_dot_product, 2: cl_qcom_dot_product8
//   WEIGHTS     0: buffer, 1: image1d_buffer, 2: image2d;   INPUTS  0: buffer, 1: image1d_buffer
#ifdef HAVE_FP16
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#endif
#if SUBGROUPS
#pragma OPENCL EXTENSION cl_khr_subgroups : enable
#endif

#if defined(REQD_QCOM)
#ifdef cl_qcom_reqd_sub_group_size
#pragma OPENCL EXTENSION cl_qcom_reqd_sub_group_size : enable
#endif
#define WAVE __attribute__((qcom_reqd_sub_group_size("half")))
#elif defined(REQD_INTEL)
#define WAVE __attribute__((intel_reqd_sub_group_size(LANES)))
#else
#define WAVE
#endif

// c + a . b, where a holds four signed bytes and b four signed ones, or unsigned ones where DOT is 2
#if DOT == 1
#pragma OPENCL EXTENSION cl_khr_integer_dot_product : enable
inline int dot4(uint a, uint b, int c) { return dot_acc_sat_4x8packed_ss_int(a, b, c); }
#elif DOT == 2
#ifdef EMULATE_QCOM_DOT
inline int qcom_dot8_acc(uint a, uint b, int c) {
  const char4 x = as_char4(a);
  const uchar4 y = as_uchar4(b);
  return c + x.s0 * y.s0 + x.s1 * y.s1 + x.s2 * y.s2 + x.s3 * y.s3;
}
#else
#pragma OPENCL EXTENSION cl_qcom_dot_product8 : enable
#endif
inline int dot4(uint a, uint b, int c) { return qcom_dot8_acc(a, b, c); }
#else
inline int dot4(uint a, uint b, int c) {
  const char4 x = as_char4(a), y = as_char4(b);
  return c + x.s0 * y.s0 + x.s1 * y.s1 + x.s2 * y.s2 + x.s3 * y.s3;
}
#endif

// share(v) makes a lane's v known to its wave; shared(i) is the v of lane i.  Every work-item gets there.
#if SUBGROUPS
#define SHARED_ROOM
#define share(v) const float4 shared_v = (v)
#define shared(i)                                                                        \
  (float4)(sub_group_broadcast(shared_v.s0, (i)), sub_group_broadcast(shared_v.s1, (i)), \
           sub_group_broadcast(shared_v.s2, (i)), sub_group_broadcast(shared_v.s3, (i)))
#define my_lane get_sub_group_local_id()
#else
#define SHARED_ROOM __local float4 shared_room[LANES * SPLITS];
#define share(v)                                                \
  barrier(CLK_LOCAL_MEM_FENCE);                                 \
  shared_room[get_local_id(1) * LANES + get_local_id(0)] = (v); \
  barrier(CLK_LOCAL_MEM_FENCE)
#define shared(i) shared_room[get_local_id(1) * LANES + (i)]
#define my_lane get_local_id(0)
#endif
