/* The linear harm head as one pass over the hidden states. Plain C, so that ctypes, C and C++ can call it.
 *
 *     x_r   = hidden[r * batch_stride + p_r * row_stride : ... + d],   p_r = index ? index[r] : r
 *     z_r   = (sum_j weight_j x_rj) / sqrt(mean_j x_rj^2 + eps)        the division only where eps >= 0
 *     out_r = logit ? y_r : 1 / (1 + exp(-y_r)),                       y_r = (z_r + bias) / temperature
 *
 * RMSNorm's scale is one number per row, so both sums come from one read of x and the normed row is never stored; its
 * gain is folded into `weight` by the caller. Sums are fp32 in an order that depends on d and dtype alone, so a row's
 * bits never depend on the rows around it. NaN in gives NaN out. A position outside [0, positions) gives NaN unread.
 *
 * One formula serves three layouts without a gather:
 *     padded last token  hidden (B, T, d), index (B,):  batch_stride = T * d, row_stride = d, positions = T
 *     packed last token  hidden (n, d),    index (B,):  batch_stride = 0,     row_stride = d, positions = n
 *     every token        hidden (n, d),    no index:    batch_stride = 0,     row_stride = d, positions = n
 */
#ifndef PROTECTOR_HARM_SCORE_H
#define PROTECTOR_HARM_SCORE_H

#include <stdint.h>

/* Raise on any change below; protector/_native.py must hold the same number, or it refuses the library. */
#define PROTECTOR_ABI 1

#if defined(_WIN32)
#define PROTECTOR_API __declspec(dllexport)
#else
#define PROTECTOR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { PROTECTOR_FP32 = 0, PROTECTOR_FP16 = 1, PROTECTOR_BF16 = 2 };

/* Status of a call; from PROTECTOR_CUDA_ERROR on it is that plus the cudaError_t. */
enum { PROTECTOR_OK = 0, PROTECTOR_BAD_ARGUMENT = 1, PROTECTOR_NO_CUDA = 2, PROTECTOR_CUDA_ERROR = 1000 };

typedef struct {
    const void *hidden;    /* dtype, aligned to its element; strides count elements and may be negative */
    const int64_t *index;  /* (rows,) or NULL */
    const float *weight;   /* (d,) fp32, gain folded in */
    float *out;            /* (rows,) fp32 */
    int64_t rows;
    int64_t d;             /* >= 1 */
    int64_t positions;     /* how many rows row_stride may step over */
    int64_t batch_stride;
    int64_t row_stride;
    float bias;
    float eps;             /* < 0: no norm */
    float temperature;     /* > 0 */
    int32_t dtype;         /* PROTECTOR_FP32, _FP16, _BF16: of hidden */
    int32_t logit;         /* 1: y, 0: sigmoid(y) */
} protector_harm_score_args;

/* PROTECTOR_ABI of the built library. */
PROTECTOR_API int protector_abi(void);
/* 1 where the CUDA kernel was built in. */
PROTECTOR_API int protector_has_cuda(void);
/* Static text of a status, never NULL. */
PROTECTOR_API const char *protector_status_text(int status);

/* Host pointers; one thread; returns when done. */
PROTECTOR_API int protector_harm_score_cpu(const protector_harm_score_args *args);
/* Device pointers on `device`; one launch on `stream` (a cudaStream_t), not waited for, fit for graph capture. */
PROTECTOR_API int protector_harm_score_cuda(const protector_harm_score_args *args, int device, void *stream);

#ifdef __cplusplus
}
#endif
#endif
